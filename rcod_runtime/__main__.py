"""``python -m rcod_runtime``: rcod-upscale, where scripts are not on the path."""

import sys

from rcod_runtime.cli.upscale import main

sys.exit(main())
