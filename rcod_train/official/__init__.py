"""Published weights to a merged checkpoint: RCOD_O, RCOD_S, and OSEDiff, which RCOD_O builds on.

layouts.py    what each published file holds, and the constants of its inference
reading.py    files of tensors, read without running anything in them, and checked
merged.py     rcod_o.pkl, osediff.pkl: LoRA that is added to the weights
guided.py     rcod_s.pkl, rcod_s_mem.pkl, de_net.pth: branches that depend on the image
importing.py  from the files to Parts and rcod.json
"""

from rcod_train.official.importing import OfficialImport, import_official
from rcod_train.official.layouts import official_info

__all__ = ["OfficialImport", "import_official", "official_info"]
