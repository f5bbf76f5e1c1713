"""Every kind of file, folder and hub data set gives its rows; what cannot be read is named with its place."""

import csv
import gzip
import json

import pytest

from rlpipe.data.files import Where, is_here, rows
from rlpipe.data.records import read
from rlpipe.errors import DataError


def jsonl(path, *records):
    path.write_text("\n".join(record if isinstance(record, str) else json.dumps(record) for record in records), encoding="utf8")
    return str(path)


def test_every_kind_of_file_gives_the_same_records(tmp_path):
    import datasets
    import pyarrow
    from pyarrow import parquet

    records = [{"question": f"q{i}", "ground_truth_answer": str(i)} for i in range(4)]
    jsonl(tmp_path / "d.jsonl", *records)
    (tmp_path / "d.jsonl.gz").write_bytes(gzip.compress((tmp_path / "d.jsonl").read_bytes()))
    (tmp_path / "d.json").write_text(json.dumps(records))
    (tmp_path / "inside.json").write_text(json.dumps({"version": 1, "rows": records}))
    (tmp_path / "named.json").write_text(json.dumps({"rows": {str(i): record for i, record in enumerate(records)}}))
    with (tmp_path / "d.csv").open("w", newline="") as file:
        writer = csv.DictWriter(file, fieldnames=list(records[0]))
        writer.writeheader()
        writer.writerows(records)
    parquet.write_table(pyarrow.Table.from_pylist(records), tmp_path / "d.parquet")
    table = datasets.Dataset.from_list(records)
    table.save_to_disk(str(tmp_path / "saved"))
    datasets.DatasetDict({"train": table, "test": table.select([0])}).save_to_disk(str(tmp_path / "splits"))
    (tmp_path / "loose").mkdir()
    parquet.write_table(pyarrow.Table.from_pylist(records), tmp_path / "loose" / "train-0.parquet")
    places = ["d.jsonl", "d.jsonl.gz", "d.json", "inside.json,records=rows", "named.json,records=rows", "d.csv", "d.parquet"]
    for place in [*places, "saved", "splits,split=train", "loose,split=train"]:
        where = Where.parse(f"{tmp_path}/{place}", "data.train")
        assert [fields for _, fields in rows(where)] == records, place
        found, report = read(where, "records", "auto", {})
        assert [record.text for record in found] == ["q0", "q1", "q2", "q3"] and report.shape == "dllm_rl" and is_here(where)
    with pytest.raises(DataError, match="several splits; say which: .*split=train|test"):
        list(rows(Where.parse(f"{tmp_path}/splits", "data.train")))
    with pytest.raises(DataError, match="no split valid"):
        list(rows(Where.parse(f"{tmp_path}/splits,split=valid", "data.train")))


def test_nested_fields_come_out_of_parquet_whole(tmp_path):
    import pyarrow
    from pyarrow import parquet

    record = {
        "prompt": [{"role": "user", "content": "q"}],
        "reward_model": {"style": "rule", "ground_truth": "7"},
        "extra_info": {"index": 3},
    }
    parquet.write_table(pyarrow.Table.from_pylist([record] * 3), tmp_path / "verl.parquet")
    found, report = read(Where.parse(str(tmp_path / "verl.parquet"), "data.train"), "records", "auto", {})
    assert report.shape == "verl" and (found[2].name, found[2].text, found[2].answer) == ("2", "q", {"answer": "7"})


@pytest.mark.parametrize(
    "name, content, message",
    [
        ("a.json", b"[1, 2", r"a.json:1: not JSON"),
        ("a.json", b"3", "a int where a list of records"),
        ("a.json", b'["text"]', "a.json:row 0: a str where an object"),
        ("a.csv", b"question,answer\n1,2,3\n", "a.csv:2: other columns"),
        ("a.parquet", b"nonsense", "not a parquet file"),
        ("a.jsonl.gz", b"nonsense", "cannot be read"),
        ("a.jsonl", b'{"prompt": "\xe9"}', "a.jsonl:1: not UTF-8"),
        ("a.jsonl.gz", gzip.compress(bytes(range(256)))[:-20] + bytes(20), "cannot be read"),
        ("a.jsonl", b'{"prompt": "a", "answer": ' + b"1" * 5000 + b"}", "a.jsonl:1: not usable JSON: Exceeds the limit"),
        ("a.json", b"[" + b"1" * 5000 + b"]", "a.json: not usable JSON: Exceeds the limit"),
        ("a.csv", b"question,answer\n" + b"x" * 200_000 + b",1\n", "a.csv:2: field larger than field limit.*save the file as"),
    ],
)
def test_files_that_cannot_be_read_are_named(tmp_path, name, content, message):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(DataError, match=message):
        read(Where.parse(str(tmp_path / name), "data.train"), "records", "auto", {})


def test_places_that_say_something_wrong_are_named(tmp_path):
    path = jsonl(tmp_path / "a.json", "{}")
    with pytest.raises(DataError, match="'splitt' behind the name is not one of split"):
        Where.parse("openai/gsm8k,splitt=train", "data.train")
    with pytest.raises(DataError, match="has no rows; it has"):
        list(rows(Where.parse(f"{path},records=rows", "data.train")))
    with pytest.raises(DataError, match="the package no_such is not installed; pip install no_such"):
        list(rows(Where.parse("package:no_such/a.jsonl", "data.test")))
    with pytest.raises(DataError, match="data.train=data/nowhere.jsonl: no such file"):
        list(rows(Where.parse("data/nowhere.jsonl", "data.train")))
    (tmp_path / "empty").mkdir()
    with pytest.raises(DataError, match="cannot be read as a data set"):
        list(rows(Where.parse(str(tmp_path / "empty"), "data.train")))


def test_a_missing_package_is_named(tmp_path, monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    (tmp_path / "a.parquet").write_bytes(b"")
    for place, package in ((tmp_path / "a.parquet", "pyarrow"), (tmp_path, "datasets"), ("owner/name", "datasets")):
        where = Where.parse(str(place), "data.train")
        message = f"data.train={place}: the package {package} is not installed; pip install {package}"
        with pytest.raises(DataError, match=message):
            list(rows(where))
    assert not is_here(Where.parse("owner/name", "data.train"))


def test_a_hub_id_out_of_reach_says_what_to_download(monkeypatch):
    import datasets

    asked = []

    def load(path, **settings):
        asked.append((path, settings))
        raise ConnectionError("Couldn't reach the Hub\nat all")

    monkeypatch.setattr(datasets, "load_dataset", load)
    where = Where.parse("openai/gsm8k,subset=main,split=train,revision=abc", "data.train")
    assert where.is_hub_id and not is_here(where)
    with pytest.raises(DataError) as error:
        list(rows(where))
    assert asked == [("openai/gsm8k", {"name": "main", "split": "train", "revision": "abc"})]
    text = str(error.value)
    assert "load_dataset('openai/gsm8k', name='main', split='train', revision='abc')" in text and "data.train=FOLDER" in text
    assert "at all" not in text and not Where.parse("data/x.jsonl", "data.train").is_hub_id


def test_a_hub_id_in_reach_is_read(monkeypatch):
    import datasets

    table = datasets.Dataset.from_list([{"question": "q", "answer": "#### 3"}])
    monkeypatch.setattr(datasets, "load_dataset", lambda path, **settings: datasets.DatasetDict({"only": table}))
    found, report = read(Where.parse("owner/name", "data.train"), "records", "auto", {})
    assert found[0].answer == {"answer": "3"} and found[0].place == "owner/name:row 0" and report.shape == "gsm8k"
