"""Which images a command line means, and where their results go."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from rcod_runtime import files
from rcod_runtime.cli.files import Task, plan_tasks
from rcod_runtime.errors import ImageError, OutputError, RcodError, UsageError
from rcod_runtime.files import PARTIAL_SUFFIX, _partial_prefix, remove_partials, write_whole


@pytest.fixture
def tree(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Empty files: planning opens none."""
    names = ["in/b.jpg", "in/a.PNG", "in/c.gif", "in/notes.txt", "in/.hidden.png", "in/x[1].png",
             "in/sub/a.png", "in/sub/deep/d.tif", "in/.trash/t.png", "in/e.png/f.png"]  # fmt: skip
    for name in names:
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).touch()
    monkeypatch.chdir(tmp_path)
    return tmp_path


def pairs(tasks: list[Task]) -> list[tuple[str, str]]:
    return [(str(task), "-" if task.target is None else task.target.as_posix()) for task in tasks]


def test_a_folder_gives_its_own_images_in_order(tree: Path) -> None:
    assert pairs(plan_tasks(["in"], "out")) == [
        ("in/a.PNG", "out/a.PNG"),
        ("in/b.jpg", "out/b.jpg"),
        ("in/c.gif", "out/c.png"),  # a format that isn't written
        ("in/x[1].png", "out/x[1].png"),
    ]
    assert not Path("out").exists()


def test_subfolders_are_kept_and_hidden_ones_left_out(tree: Path) -> None:
    found = pairs(plan_tasks(["in"], "out", recursive=True))
    assert found[4:] == [
        ("in/e.png/f.png", "out/e.png/f.png"),
        ("in/sub/a.png", "out/sub/a.png"),
        ("in/sub/deep/d.tif", "out/sub/deep/d.tif"),
    ]


def test_results_inside_the_input_folder_are_not_taken_as_inputs(tree: Path) -> None:
    before = plan_tasks(["in"], "in/sharp", recursive=True)
    Path("in/sharp").mkdir()
    Path("in/sharp/a.png").touch()
    assert plan_tasks(["in"], "in/sharp", recursive=True) == before


def test_patterns_give_images_alone(tree: Path) -> None:
    assert [s for s, _ in pairs(plan_tasks(["in/*"], "out"))] == [
        "in/a.PNG", "in/b.jpg", "in/c.gif", "in/x[1].png",
    ]  # fmt: skip
    assert [s for s, _ in pairs(plan_tasks(["in/**/[d-f].*"], "out"))] == [
        "in/e.png/f.png", "in/sub/deep/d.tif",
    ]  # fmt: skip
    assert pairs(plan_tasks(["in/b*"], "o.webp")) == [("in/b.jpg", "o.webp")]


def test_a_file_whose_name_looks_like_a_pattern_is_that_file(tree: Path) -> None:
    assert pairs(plan_tasks(["in/x[1].png"], "out")) == [("in/x[1].png", "out/x[1].png")]


def test_a_format_is_chosen_for_results_in_a_folder_or_on_stdout(tree: Path) -> None:
    assert [t for _, t in pairs(plan_tasks(["in/a.PNG", "in/c.gif"], "out", "webp"))] == [
        "out/a.webp", "out/c.webp",
    ]  # fmt: skip
    assert plan_tasks(["-"], "-") == [Task(None, None, "PNG")]
    assert plan_tasks(["in/b.jpg"], "-", "jpeg") == [Task(Path("in/b.jpg"), None, "JPEG")]
    assert plan_tasks(["-"], "o.tif") == [Task(None, Path("o.tif"), "TIFF")]


@pytest.mark.parametrize(
    ("inputs", "out", "options", "error", "message"),
    [
        (["none.png"], "out", {}, ImageError, "none.png: not found"),
        (["n" * 300], "out", {}, ImageError, "nnn: not found, or can't be reached"),
        (["in/b.jpg"], f"{'n' * 300}/o.png", {}, OutputError, "does not exist"),
        (["in/*.webp"], "out", {}, ImageError, r"no image matches"),
        (["in/sub/deep/../../.trash/.."], "-", {}, UsageError, "expected one image, found 4"),
        (["-", "in/b.jpg"], "out", {}, UsageError, "no other input"),
        (["-"], "in", {}, UsageError, "name of an image"),
        (["-"], "folder", {}, UsageError, "name of an image"),
        (["in"], "o.png", {}, UsageError, "expected a folder for several images"),
        (["in/b.jpg"], "o.png", {"format_choice": "jpeg"}, UsageError, "PNG, --format jpeg"),
        (["in/b.jpg"], "none/o.png", {}, OutputError, "does not exist"),
        (["in/b*"], "o.gif", {}, OutputError, "found '.gif'"),
        (["in/*"], "o.gif", {}, UsageError, "expected a folder for several images"),
        (["in/b.jpg"], "sharp.v2", {}, OutputError, "found '.v2'. For a folder end -o with /"),
        (["in/a.PNG", "in/sub/a.png"], "out", {"format_choice": "png"}, OutputError, "both"),
        (["in/b.jpg", "in/a.PNG"], "in", {}, UsageError, "would replace an input"),
    ],
)
def test_what_cannot_be_meant_is_refused(
    tree: Path,
    inputs: list[str],
    out: str,
    options: dict[str, str],
    error: type[RcodError],
    message: str,
) -> None:
    with pytest.raises(error, match=message):
        plan_tasks(inputs, out, **options)  # type: ignore[arg-type]


def test_an_input_is_not_replaced_under_another_of_its_names(tree: Path) -> None:
    """A second link stands in for a disk that takes B.JPG for b.jpg."""
    os.link("in/b.jpg", "second.jpg")
    with pytest.raises(UsageError, match=r"second.jpg: would replace an input"):
        plan_tasks(["in/b.jpg"], "second.jpg")


@pytest.mark.parametrize(("platform", "refused"), [("linux", False), ("darwin", True)])
def test_two_results_whose_names_differ_in_case_alone(
    tree: Path, monkeypatch: pytest.MonkeyPatch, platform: str, refused: bool
) -> None:
    """On some systems the second one would replace the first."""
    monkeypatch.setattr("rcod_runtime.cli.files.sys.platform", platform)
    inputs = ["in/a.PNG", "in/sub/a.png"]
    if refused:
        with pytest.raises(OutputError, match=r"a\.png: both in/a\.PNG and in/sub/a\.png"):
            plan_tasks(inputs, "out")
    else:
        assert [t for _, t in pairs(plan_tasks(inputs, "out"))] == ["out/a.PNG", "out/a.png"]


def test_what_is_named_twice_is_one_image(tree: Path) -> None:
    once = plan_tasks(["in"], "out")
    assert plan_tasks(["in", "in/b.jpg", "in/../in/*.jpg"], "out") == once
    assert plan_tasks(["in/b.jpg", "in/b.jpg"], "o.png") == plan_tasks(["in/b.jpg"], "o.png")


def test_a_dot_is_no_suffix_where_no_image_has_it(tree: Path) -> None:
    for name in ("IMG.2024", "IMG.2025", "at 10.30.15"):
        os.link("in/b.jpg", name)
    found = plan_tasks(["IMG.2024", "IMG.2025", "at 10.30.15"], "out")
    expected = ["out/IMG.2024.png", "out/IMG.2025.png", "out/at 10.30.15.png"]
    assert [t for _, t in pairs(found)] == expected


@pytest.mark.parametrize(
    ("inputs", "out"), [(["in/b*"], "sharp.v2"), (["in/b.jpg"], "v1.0/"), (["in/b*"], "v1.0/")]
)
def test_a_folder_may_have_a_dot(tree: Path, inputs: list[str], out: str) -> None:
    """As many images as there are now say nothing of what -o is."""
    assert pairs(plan_tasks(inputs, out)) == [("in/b.jpg", f"{out.rstrip('/')}/b.jpg")]


def test_a_linked_folder_is_left_out_and_named(
    tree: Path, caplog: pytest.LogCaptureFixture
) -> None:
    before = plan_tasks(["in"], "out", recursive=True)
    os.symlink("../in", "in/round")
    assert plan_tasks(["in"], "out", recursive=True) == before
    assert "in/round: a linked folder, left out" in caplog.text
    once = plan_tasks(["in/*"], "out")
    assert plan_tasks(["in/*", "in/round/*"], "out") == once  # nor are its images others


def test_what_a_running_process_is_writing_stays(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    target = tmp_path / "o.png"
    left = tmp_path / f"{_partial_prefix(target)}0123456789abcdef{PARTIAL_SUFFIX}"
    left.touch()
    synced, moved = os.fsync, Path.replace

    def and_another_run_begins(handle: int) -> None:
        remove_partials([target])
        synced(handle)

    def or_does_now(self: Path, to: Path) -> Path:
        remove_partials([target])
        return moved(self, to)

    monkeypatch.setattr("rcod_runtime.files.os.fsync", and_another_run_begins)
    monkeypatch.setattr(Path, "replace", or_does_now)
    write_whole(target, b"all of it")
    assert [path.name for path in tmp_path.iterdir()] == ["o.png"]


def test_what_cannot_be_told_of_a_left_over_stops_no_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Another user's may be in use; a link that leads nowhere is none."""
    target = tmp_path / "o.png"
    theirs, link = (
        tmp_path / f"{_partial_prefix(target)}{name}{PARTIAL_SUFFIX}" for name in ("theirs", "link")
    )
    theirs.touch()
    link.symlink_to(tmp_path / "nowhere")
    opened = files.open_regular

    def not_theirs(path: Path) -> object:
        if path == theirs:
            raise PermissionError(13, "Permission denied")
        return opened(path)

    monkeypatch.setattr(files, "open_regular", not_theirs)
    remove_partials([target])
    assert list(tmp_path.iterdir()) == [theirs]
