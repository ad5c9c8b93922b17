"""Prompts files as people have them: taken where it is clear what is meant, else named in one line."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from ltxpack.errors import UsageError
from ltxpack.runtime.prompts_file import PromptsLine, read_lines
from ltxpack.runtime.settings import SettingsGiven

SMALL = SettingsGiven(height=64, width=64, num_frames=9, steps=2)
TWO = [{"prompt": "a boat"}, {"prompt": "a dog, é", "seed": 3}]
LINES = "\n".join(map(json.dumps, TWO))


def read(folder: Path, name: str, content: str | bytes) -> list[PromptsLine]:
    path = folder / name
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return read_lines(path, SMALL)


@pytest.mark.parametrize(
    ("name", "content", "word"),
    [
        ("a.jsonl", LINES, "line"),
        ("a.txt", LINES, "line"),
        ("a.jsonl", f"\ufeff{LINES}", "line"),
        ("a.jsonl", LINES.encode("utf-16"), "line"),
        ("a.jsonl", f"\ufeff{LINES}".encode("utf-16-be"), "line"),
        ("a.jsonl", LINES.encode("utf-32"), "line"),
        ("a.jsonl", LINES.replace("\n", "\r\n"), "line"),
        ("a.jsonl", LINES.replace("\n", "\r"), "line"),
        ("a.jsonl", LINES.replace("\n", ",\n") + ",", "line"),
        ("a.json", json.dumps(TWO), "item"),
        ("a.jsonl", json.dumps(TWO, indent=2), "item"),
        ("a.json", json.dumps(TWO, indent="\t", ensure_ascii=False).encode("utf-16"), "item"),
        ("a.json", "[\n" + LINES.replace("\n", ",\n") + "\n]\n", "item"),
        ("a.json", "\n".join(json.dumps(video, indent=4) for video in TWO), "item"),
    ],
)
def test_json_in_any_layout_is_the_same_videos(name: str, content: str | bytes, word: str, tmp_path: Path) -> None:
    found = read(tmp_path, name, content)
    assert [(each.request.prompt, each.request.settings.seed) for each in found] == [("a boat", 10), ("a dog, é", 3)]
    assert [each.name for each in found] == [f"{word} 1", f"{word} 2"]
    assert [each.output.name for each in found] == ["a-0001.mp4", "a-0002.mp4"]


def test_one_indented_object_with_pictures_is_one_video(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    Image.new("RGB", (8, 8)).save(tmp_path / "a.png")
    images = [{"path": "a.png"}, {"path": "~/a.png", "frame": "last"}]
    said = {"prompt": "x", "images": images, "output": "~/v.mp4"}
    (found,) = read(tmp_path, "a.json", json.dumps(said, indent=1))
    assert found.output == tmp_path / "v.mp4"
    assert [(image.path, image.frame) for image in found.request.images] == [(tmp_path / "a.png", at) for at in (0, 8)]


@pytest.mark.parametrize("name", ["a.txt", "A.TXT", "prompts"])
@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16"])
def test_each_line_of_plain_text_is_a_prompt(name: str, encoding: str, tmp_path: Path) -> None:
    text = "A boat, drifting; rain: heavy -- “é”.\r\n\r\n  size\r\nA dog {barks} [twice].\r\n"
    found = read(tmp_path, name, text.encode(encoding))
    prompts = ["A boat, drifting; rain: heavy -- “é”.", "size", "A dog {barks} [twice]."]
    assert [each.request.prompt for each in found] == prompts
    assert [each.number for each in found] == [1, 3, 4]


@pytest.mark.parametrize("first", ['"A boat."', "[wide shot] a boat", "1984"])
def test_a_prompt_may_look_like_the_start_of_json(first: str, tmp_path: Path) -> None:
    found = read(tmp_path, "a.txt", f'{first}\n"A dog."\n')
    assert [each.request.prompt for each in found] == [first, '"A dog."']


def test_a_list_of_strings_is_prompts(tmp_path: Path) -> None:
    assert [each.request.prompt for each in read(tmp_path, "a.json", '["a boat", "a dog"]')] == ["a boat", "a dog"]


@pytest.mark.parametrize(
    ("name", "content", "found"),
    [
        ("a.csv", "a boat,1\n", "a table (CSV)"),
        ("a.txt", "prompt,seed\na boat,1\n", "a table (CSV)"),
        ("a.txt", '"Prompt";"negative"\na;b\n', "a table (CSV)"),
        ("a.txt", "prompt\na boat\n", "a table (CSV)"),
        ("a.jsonl", "A boat.\nA dog.\n", "plain text: A boat."),
        ("a.yaml", "- prompt: a boat\n  seed: 1\n", "YAML"),
        ("a.txt", "prompt: a boat\n", "YAML"),
        ("a.txt", "<!doctype html>\n", "a web page"),
        ("a.jsonl", LINES.encode("utf-16-le"), "UTF-16 without a byte order mark"),
        ("a.jsonl", b"PK\3\4\0\0\0\0", "binary data"),
        ("a.json", '[\n{"prompt": "a"},\n]', "line 3: Expecting value; a comma stands before a closing bracket"),
        ("a.json", '[\n{"prompt": "a"}\n{"prompt": "b"}]', "line 3: Expecting ',' delimiter"),
        ("a.json", '{\n"prompt": "a",\n}', "a comma stands before a closing bracket"),
        ("a.json", "[" * 100_000, "nested too deeply"),
    ],
)
def test_files_of_other_forms_are_named_in_one_line(
    name: str, content: str | bytes, found: str, tmp_path: Path
) -> None:
    with pytest.raises(UsageError) as refused:
        read(tmp_path, name, content)
    assert found in str(refused.value.found) and "help" not in refused.value.next
    assert len(refused.value.render().splitlines()) == 3


def test_an_odd_utf16_file_and_files_without_a_video(tmp_path: Path) -> None:
    for content, says in (
        (b"", "no line"),
        (b"\n \n", "no line"),
        (b"\xef\xbb\xbf", "no line"),
        (b"\xff\xfea", "not sound UTF-16 text"),
        (b"[]", "holds no item"),
        (b"[0, 1]", "2 other"),
        (b"\xff\xfe", "no line"),
    ):
        with pytest.raises(UsageError, match=says):
            read(tmp_path, "a.jsonl", content)


@pytest.mark.parametrize(
    ("name", "line", "says"),
    [
        ("a.txt", "# a comment", "comment or a prompt"),
        ("a.txt", "A boat --w 512 --h 768", "an option in a prompt (--w)"),
        ("a.txt", "--prompt boat", "an option in a prompt (--prompt)"),
        ("a.txt", b"caf\xe9", "not UTF-8"),
        ("a.jsonl", b'{"prompt": "\xff"}', "not UTF-8"),
        ("a.jsonl", "{'prompt': 'a'}", "JSON has double quotes"),
        ("a.jsonl", "{“prompt”: “a”}", "JSON has straight quotes"),
        ("a.jsonl", '{"prompt": "a",}', "a comma stands before a closing bracket"),
    ],
)
def test_lines_at_fault_are_told_with_what_is_wrong(name: str, line: str | bytes, says: str, tmp_path: Path) -> None:
    first = b"A boat.\n" if name == "a.txt" else b'{"prompt": "a"}\n'
    with pytest.raises(UsageError) as refused:
        read(tmp_path, name, first + (line if isinstance(line, bytes) else line.encode()))
    (item,) = refused.value.items
    assert str(item).startswith("line 2: ") and says in str(item)


@pytest.mark.parametrize(
    ("field", "says"),
    [
        ({"negativePrompt": "x"}, "did you mean negative_prompt?"),
        ({"frames": 9}, "did you mean num_frames?"),
        ({"numFrames": 9}, "did you mean num_frames?"),
        ({"duration": 3}, "did you mean num_frames (seconds"),
        ({"num_inference_steps": 9}, "did you mean steps?"),
        ({"Seed": 1}, "did you mean seed?"),
        ({"frame-rate": 1}, "did you mean fps?"),
        ({"image": "a.png"}, 'did you mean images: [{"path": "a.png"}]?'),
        ({"resolution": "1x1"}, "did you mean height and width?"),
        ({"promt": "x"}, "did you mean prompt?"),
        ({"cfg": 3}, "give --video-cfg and --audio-cfg on the command line"),
        ({"video_cfg": 3}, "give --video-cfg on the command line"),
        ({"imageCrf": 3}, "give --image-crf on the command line"),
        ({"stage1": "base"}, "give --stage1 on the command line"),
        ({"zzz": 1}, "there are prompt, recipe, negative_prompt"),
        ({"images": [{"file": "a.png"}]}, "images: 0: there is no field 'file'; did you mean path?"),
        ({"images": [{"path": "a.png", "frame_idx": 1}]}, "did you mean frame?"),
        ({"prompts": [{"prompt": "a"}]}, "did you mean the list alone"),
    ],
)
def test_fields_of_other_tools_get_ours(field: dict[str, Any], says: str, tmp_path: Path) -> None:
    with pytest.raises(UsageError) as refused:
        read(tmp_path, "a.jsonl", json.dumps({"prompt": "a", **field}))
    (item,) = refused.value.items
    assert says in str(item) and "\n" not in str(item)


def test_faults_in_a_list_are_told_by_item(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="2 of 3 items cannot be used") as refused:
        read(tmp_path, "a.json", json.dumps([{"prompt": "a"}, 5, {"prompt": "b", "frames": 9}], indent=1))
    assert [str(item).partition(": ")[0] for item in refused.value.items] == ["item 2", "item 3"]
    with pytest.raises(UsageError, match="same output as item 1"):
        read(tmp_path, "a.json", json.dumps([{"prompt": "a", "output": "x.mp4"}] * 2))
