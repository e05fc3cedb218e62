"""Prompt files: every row arrives or is an error that names its line; slices, keys, templates, shuffles."""

import json
import random

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from slime.utils.data import DataError, Dataset, PlaceholderError, filter_long_prompt, get_source, read_file
from slime.utils.types import Sample
from tests.unit.rollout.fakes import FakeTokenizer


@pytest.fixture
def jsonl(tmp_path):
    def write(*rows, name="data.jsonl"):
        file = tmp_path / name
        file.write_text("".join((row if isinstance(row, str) else json.dumps(row)) + "\n" for row in rows))
        return str(file)

    return write


@pytest.fixture
def parquet(tmp_path):
    def write(rows):
        file = tmp_path / "data.parquet"
        pq.write_table(pa.Table.from_pylist(rows), file, row_group_size=2)
        return str(file)

    return write


def dataset(path, max_length=None, **kwargs):
    kwargs.setdefault("prompt_key", "prompt")
    return Dataset(path, FakeTokenizer(), None, max_length, **kwargs)


def test_rows_become_samples_with_label_metadata_and_tools(jsonl):
    path = jsonl({"prompt": "2+2?", "label": "4", "metadata": {"rm_type": "math"}, "tools": '[{"name": "calc"}]'})
    (sample,) = dataset(path, label_key="label", tool_key="tools").samples
    assert (sample.prompt, sample.label) == ("2+2?", "4")
    assert sample.metadata == {"rm_type": "math", "tools": [{"name": "calc"}]}
    assert sample.status is Sample.Status.PENDING


@pytest.mark.parametrize(
    ("slicing", "numbers"),
    [
        ("", [0, 1, 2, 3, 4]),
        ("@[1:3]", [1, 2]),
        ("@[:2]", [0, 1]),
        ("@[3:]", [3, 4]),
        ("@[-2:]", [3, 4]),
        ("@[:-4]", [0]),
        ("@[-4:-2]", [1, 2]),
        ("@[:]", [0, 1, 2, 3, 4]),
        ("@[4:99]", [4]),
        ("@[3:1]", []),
    ],
)
@pytest.mark.parametrize("kind", ["jsonl", "parquet"])
def test_slices_take_the_rows_that_python_would(jsonl, parquet, kind, slicing, numbers):
    rows = [{"n": n} for n in range(5)]
    path = jsonl(*rows) if kind == "jsonl" else parquet(rows)
    assert [row["n"] for row in read_file(path + slicing)] == numbers


@pytest.mark.parametrize(
    ("bad", "message"),
    [
        ('{"prompt": "b"', "line 3: not JSON"),
        ("[1, 2]", r"line 3: a row must be a JSON object .* not list"),
        ({"text": "b"}, r"line 3: no key 'prompt' \(--input-key\). The row has: 'text'"),
        ({"prompt": "b"}, r"line 3: no key 'label' \(--label-key\)"),
        ({"prompt": "", "label": ""}, "line 3: the prompt 'prompt' is empty"),
        ({"prompt": 5, "label": ""}, "line 3: the prompt 'prompt' must be text or a list of messages, not int 5"),
        ({"prompt": [], "label": ""}, "line 3: the prompt"),
        ({"prompt": ["hi"], "label": ""}, "line 3: a message must look like"),
        ({"prompt": "b", "label": "", "metadata": "x"}, "line 3: 'metadata' .* must be an object, not str 'x'"),
        ({"prompt": "b", "label": "", "tools": {"a": 1}}, "line 3: 'tools' .* must be a list"),
    ],
)
def test_a_bad_row_is_an_error_with_file_and_line(jsonl, bad, message):
    good = {"prompt": "a", "label": "1"}
    path = jsonl(good, "", bad, good)
    with pytest.raises(DataError, match=f"data.jsonl, {message}"):
        dataset(path, label_key="label", tool_key="tools")


def test_a_bad_parquet_row_is_counted_over_all_row_groups(parquet):
    path = parquet([{"prompt": "a"}, {"prompt": "b"}, {"prompt": "c"}, {"prompt": ""}])
    with pytest.raises(DataError, match=r"data\.parquet, row 4: the prompt"):
        dataset(path)


def test_bytes_that_are_no_text_are_an_error_with_their_line(tmp_path):
    file = tmp_path / "data.jsonl"
    file.write_bytes(b'{"prompt": "a"}\n{"prompt": "\xff"}\n')
    with pytest.raises(DataError, match="line 2: not JSON"):
        dataset(str(file))


def test_files_that_cannot_be_read_say_why(tmp_path, jsonl):
    with pytest.raises(FileNotFoundError, match="no prompt file"):
        dataset(str(tmp_path / "absent.jsonl"))
    with pytest.raises(DataError, match=r"neither .jsonl nor .parquet"):
        dataset(jsonl({"prompt": "a"}, name="data.csv"))
    with pytest.raises(DataError, match="no rows"):
        dataset(jsonl(""))
    with pytest.raises(DataError, match="not a parquet file"):
        dataset(jsonl({"prompt": "a"}, name="data.parquet"))


def test_text_and_messages_go_through_the_chat_template(jsonl):
    path = jsonl({"prompt": "hi"}, {"prompt": [{"role": "system", "content": "s"}, {"role": "user", "content": "u"}]})
    first, second = dataset(path, apply_chat_template=True).samples
    assert first.prompt == "<user>hi</><assistant>"
    assert second.prompt == "<system>s</><user>u</><assistant>"
    plain, messages = dataset(path).samples
    assert plain.prompt == "hi"
    assert messages.prompt[1] == {"role": "user", "content": "u"}


def test_a_template_that_fails_names_the_row(jsonl):
    path = jsonl({"prompt": "hi"}, {"prompt": [{"role": "robot", "content": "u"}]})
    with pytest.raises(DataError, match="line 2: the chat template does not take this prompt: unknown role robot"):
        dataset(path, apply_chat_template=True)


def test_a_tokenizer_without_template_is_an_error_before_the_rows(jsonl):
    tokenizer = FakeTokenizer()
    tokenizer.chat_template = None
    with pytest.raises(ValueError, match="has no chat template"):
        Dataset(jsonl({"prompt": "hi"}), tokenizer, None, None, prompt_key="prompt", apply_chat_template=True)


def test_placeholders_take_the_items_in_order(jsonl):
    path = jsonl({"prompt": "a <image> b <image>", "pics": ["x.png", {"type": "image", "image": "y.png"}]})
    (sample,) = dataset(path, multimodal_keys={"image": "pics"}).samples
    assert sample.prompt[0]["content"] == [
        {"type": "text", "text": "a "},
        {"type": "image", "image": "x.png"},
        {"type": "text", "text": " b "},
        {"type": "image", "image": "y.png"},
    ]


@pytest.mark.parametrize("pics", [["x.png"], ["x.png", "y.png", "z.png"], None])
def test_placeholders_and_items_must_be_as_many(jsonl, pics):
    path = jsonl({"prompt": "a <image> b <image>", "pics": pics})
    with pytest.raises(AssertionError, match="line 1") as error:
        dataset(path, multimodal_keys={"image": "pics"})
    assert isinstance(error.value, PlaceholderError)


def test_the_order_of_an_epoch_depends_on_seed_and_epoch_only(jsonl):
    path = jsonl(*({"prompt": str(n)} for n in range(20)))
    data = dataset(path, seed=7)
    data.shuffle(3)
    straight = [sample.prompt for sample in data.samples]
    data.shuffle(1)
    data.shuffle(3)
    data.shuffle(3)
    order = list(range(20))
    random.seed(7 + 3)
    random.shuffle(order)
    assert [sample.prompt for sample in data.samples] == straight == [str(n) for n in order]
    assert [sample.prompt for sample in data.origin_samples] == [str(n) for n in range(20)]
    assert len(data) == 20
    assert data[0].prompt == straight[0]


def test_long_prompts_are_left_out_and_order_is_kept(jsonl):
    path = jsonl({"prompt": "aaaa"}, {"prompt": "bb"}, {"prompt": "ccc"})
    assert [sample.prompt for sample in dataset(path, max_length=3).samples] == ["bb", "ccc"]
    with pytest.raises(DataError, match="every prompt has more than 1 tokens"):
        dataset(path, max_length=1)


def test_message_lists_have_no_length_to_filter_by():
    messages = Sample(prompt=[{"role": "user", "content": "long enough"}])
    assert filter_long_prompt([messages, Sample(prompt="abc")], FakeTokenizer(), None, 2) == [messages]


def test_drawing_starts_over_at_the_end_and_gives_copies(jsonl):
    data = dataset(jsonl({"prompt": "a"}, {"prompt": "b"}, {"prompt": "c"}))
    assert [sample.prompt for sample in data.sample(2) + data.sample(2)] == ["a", "b", "c", "a"]
    data.sample(1)[0].prompt = "changed"
    assert data[1].prompt == "b"


def test_the_source_is_an_attribute_a_metadata_entry_or_unknown():
    sample = Sample(metadata={"source_name": "meta"})
    assert get_source(sample) == "meta"
    sample.source = "attribute"
    assert get_source(sample) == "attribute"
    assert get_source(Sample()) == "unknown"
