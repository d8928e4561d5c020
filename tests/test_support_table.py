"""tools/support_table.py: rows in, a table between the markers, nothing else touched."""

import json

import pytest

from tools.support_table import BEGIN, END, main

ROW = {
    "name": "dense | PP2, E|tt|L",
    "kind": "dense",
    "layout": "PP2, E|tt|L",
    "ranks": 2,
    "mhc": {"loss_error": 3.2e-8, "grad_norm_error": 9.7e-8},
    "none": {"loss_error": 0.0, "grad_norm_error": 0.0},
}


@pytest.fixture
def files(tmp_path):
    records, readme = tmp_path / "layouts.jsonl", tmp_path / "README.md"
    records.write_text(json.dumps(ROW) + "\n")
    readme.write_text(f"before\n{BEGIN}\nold\n{END}\nafter\n")
    return ["--records", str(records), "--readme", str(readme)], records, readme


def test_the_table_goes_between_the_markers(files) -> None:
    options, _, readme = files
    assert main([*options, "--check"]) == 1
    assert main(options) == 0
    text = readme.read_text()
    assert text.startswith(f"before\n{BEGIN}\n| model |")
    assert text.endswith(f"\n{END}\nafter\n")
    assert "| dense | PP2, E\\|tt\\|L | 2 | 1e-07 | none |" in text
    assert main([*options, "--check"]) == 0


@pytest.mark.parametrize("text", ["", f"{END}{BEGIN}", f"{BEGIN}{BEGIN}{END}"])
def test_a_readme_without_its_markers_is_left_alone(files, text, capsys) -> None:
    options, _, readme = files
    readme.write_text(text)
    assert main(options) == 2
    assert capsys.readouterr().err.startswith("error: ")
    assert readme.read_text() == text


@pytest.mark.parametrize("line", ["{", '{"kind": "dense"}', "[]"])
def test_broken_records_are_named(files, line, capsys) -> None:
    options, records, readme = files
    records.write_text(json.dumps(ROW) + "\n" + line + "\n")
    assert main(options) == 2
    assert "line 2" in capsys.readouterr().err
    assert "old" in readme.read_text()


def test_without_records(files, capsys) -> None:
    options, records, _ = files
    records.unlink()
    assert main(options) == 2
    assert "test_layouts.py" in capsys.readouterr().err
