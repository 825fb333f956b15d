"""The sheet on which people compare methods, and what is counted of their answers."""

import csv
import json
import shutil

import pytest
from PIL import Image

from mole_cli.mole import main
from mole_world.evaluation.judging_sheet import agreement, count_answers, votes, write_sheet
from mole_world.evaluation.rows import picture_path, save_picture


@pytest.fixture
def sheet(tmp_path):
    """A sheet over three methods and two prompts of the same concepts; each method has a colour."""
    rows = []
    for method, colour in (("sum", "red"), ("mean", "green"), ("gates", "blue")):
        for prompt in ("a fox in ink", "ink: a fox"):
            rows.append({"method": method, "case": "fox+ink", "kind": "pair", "seed": 1, "prompt": prompt, "settings": {}})
            save_picture(Image.new("RGB", (8, 8), colour), picture_path(tmp_path, rows[-1]))
    assert write_sheet(tmp_path, rows) == 12
    return tmp_path


def test_the_sheet_asks_each_pair_in_both_orders_and_blind(sheet):
    key = json.loads((sheet / "sheet" / "key.json").read_text())
    asked = {(q["prompt"], q["left"], q["right"]) for q in key}
    assert len(asked) == 12
    assert {(s, b, a) for s, a, b in asked} == asked
    colours = {"sum": (255, 0, 0), "mean": (0, 128, 0), "gates": (0, 0, 255)}
    for number, question in enumerate(key):
        image = Image.open(sheet / "sheet" / f"{number:04}.png")
        left, right = (image.getpixel((image.width * x // 4, image.height // 2)) for x in (1, 3))
        assert (left, right) == (colours[question["left"]], colours[question["right"]])
    text = (sheet / "sheet" / "answers.csv").read_text()
    assert not any(method in text for method in colours)


def test_a_sheet_is_in_utf_8_whatever_the_locale(tmp_path, ascii_locale):
    row = {"case": "fox", "kind": "one", "seed": 1, "prompt": "füchse", "settings": {}}
    rows = [{"method": method, **row} for method in ("sum", "mean")]
    for each in rows:
        save_picture(Image.new("RGB", (8, 8)), picture_path(tmp_path, each))
    write_sheet(tmp_path, rows)
    assert "füchse" in (tmp_path / "sheet" / "answers.csv").read_text("utf-8")
    assert count_answers(tmp_path)


def answer(sheet, choose, judge=""):
    path = sheet / "sheet" / f"answers{judge}.csv"
    if judge:
        shutil.copy(sheet / "sheet" / "answers.csv", path)
    lines = list(csv.reader(path.open()))
    for line, question in zip(lines[1:], json.loads((sheet / "sheet" / "key.json").read_text()), strict=True):
        line[2] = choose(question)
    with path.open("w", newline="") as file:
        csv.writer(file).writerows(lines)


def test_answers_are_counted_for_methods_and_not_for_sides(sheet, capsys):
    def choose(q):
        if "gates" in (q["left"], q["right"]):
            return "left" if q["left"] == "gates" else "Right "
        return "left" if q["prompt"] == "a fox in ink" else ""  # sum against mean: always the left one, or no answer

    answer(sheet, choose)
    lines = count_answers(sheet).splitlines()
    assert "| gates | sum | 4 | 0 | 0 | 1.00 [0.21, 1.00] | 1.00 |" in lines
    assert "| gates | mean | 4 | 0 | 0 | 1.00 [0.21, 1.00] | 1.00 |" in lines
    assert "| mean | sum | 1 | 1 | 0 | 0.50 [0.00, 1.00] | 0.00 |" in lines
    assert main(["evaluate", "--judged", "--out", str(sheet)]) == 0
    assert capsys.readouterr().out.splitlines() == lines
    assert main(["evaluate", "--judged", "--json", "--out", str(sheet)]) == 0
    pair = {"first method": "gates", "second method": "sum", "first better": 4, "second better": 0, "same": 0}
    pair |= {"share of the first": "1.00 [0.21, 1.00]", "orders agree": 1.0}
    assert pair in json.loads(capsys.readouterr().out)
    with pytest.raises(ValueError, match="holds answers: count them with --judged"):
        write_sheet(sheet, [])
    answer(sheet, lambda q: "both")
    with pytest.raises(ValueError, match="question 0000: 'both' is none of"):
        count_answers(sheet)


def test_the_agreement_of_judges_is_krippendorffs_alpha(sheet):
    """Of two judges on twelve questions, by hand: alpha = 1 - observed / expected disagreement."""
    assert agreement(sheet) is None  # one judge, who has not answered
    answer(sheet, lambda q: max(("left", "right"), key=q.get), "-anna")
    answer(sheet, lambda q: max(("left", "right"), key=q.get), "-bob")
    assert agreement(sheet) == 1
    assert {(own["first better"], own["second better"]) for own in votes(sheet)} == {(0, 8)}  # "sum" is the last name
    first = json.loads((sheet / "sheet" / "key.json").read_text())[0]
    answer(sheet, lambda q: "same" if q == first else max(("left", "right"), key=q.get), "-bob")
    given = [max((q["left"], q["right"])) for q in json.loads((sheet / "sheet" / "key.json").read_text())]
    values = [*given, *given[1:], "same"]
    pairs = sum(a != b for i, a in enumerate(values) for j, b in enumerate(values) if i != j)
    assert agreement(sheet) == pytest.approx(1 - (2 / 24) / (pairs / (24 * 23)))
    assert f"Krippendorff's alpha (1: full, 0: as by chance): {agreement(sheet):.2f}" in count_answers(sheet)
    with pytest.raises(ValueError, match="holds answers"):
        write_sheet(sheet, [])


def test_a_sheet_that_was_edited_by_hand_is_counted_or_says_what_is_wrong(sheet):
    path = sheet / "sheet" / "answers.csv"
    answer(sheet, lambda q: "left")
    table, text = count_answers(sheet), path.read_text()
    path.write_text(text.replace("\n", "\n\n", 3) + "\n")
    assert count_answers(sheet) == table
    path.write_text(text)
    answer(sheet, lambda q: "left" if q["left"] == "gates" else "right" if q["right"] == "gates" else "same")
    table, (head, *lines) = count_answers(sheet), path.read_text().splitlines()
    path.write_text("\n".join([head, *sorted(lines, key=lambda line: line[::-1])]))  # as a spreadsheet sorts by answer
    assert count_answers(sheet) == table
    path.write_text("\n".join([head, *(line.lstrip("0") for line in lines[1:]), "0" + lines[0][4:]]))  # and writes numbers
    assert count_answers(sheet) == table
    for edited, message in (
        (text.replace(",", ";"), "is not question, prompt and answer, with commas between them"),
        (text.rsplit("\n", 2)[0], "a row for each question from 0000 to 0011, each once"),
        (text.replace("0001,", "0002,"), "a row for each question from 0000 to 0011, each once"),
        (text.replace("0001,", "one,"), "is not question, prompt and answer"),
    ):
        path.write_text(edited)
        with pytest.raises(ValueError, match=message):
            count_answers(sheet)
