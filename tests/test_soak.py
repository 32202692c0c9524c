"""The soak of flash_decode in one launch, short: it passes, and it can fail."""

import json

import pytest

pytest.importorskip("triton", reason="needs triton, which there is for Linux only")

SIZES = ["--sizes", "256x128x32x4", "--tokens", "5", "--calls", "2000", "--every", "1000"]


@pytest.fixture
def soak_decode(load_benchmark):
    return load_benchmark("soak_decode")


@pytest.mark.gpu
@pytest.mark.parametrize("policy", ["static", "queue", "actor"])
def test_two_thousand_calls(policy, soak_decode, capsys, tmp_path):
    out = tmp_path / "new" / "rows.jsonl"
    assert soak_decode.main([*SIZES, "--policy", policy, "--out", str(out), "--commit", "0123456"]) == 0
    row = json.loads(out.read_text())
    assert (row["policy"], row["wrong_rows"], row["flags"], row["commit"]) == (policy, 0, 0, "0123456")
    assert row["calls"] >= 2000
    first, *lines = capsys.readouterr().out.splitlines()
    assert first.endswith("results verified")
    assert len(lines) == 2
    assert all(" 0 wrong rows" in line and " 0 flags" in line for line in lines)


@pytest.mark.gpu
def test_a_wrong_row_is_found(soak_decode, monkeypatch, capsys):
    def spoil(*arguments):
        questions = make_questions(*arguments)
        questions[0].answers[0, 0, 0] += 1
        return questions

    make_questions = soak_decode.make_questions
    monkeypatch.setattr(soak_decode, "make_questions", spoil)
    assert soak_decode.main(SIZES) == 1
    assert " 0 wrong rows" not in capsys.readouterr().out.splitlines()[-1]


@pytest.mark.gpu
def test_a_wrong_result_is_not_soaked(soak_decode, monkeypatch):
    original = soak_decode._call
    monkeypatch.setattr(soak_decode, "_call", lambda layer, backend, *rest: original(layer, backend, *rest) * (
        1.05 if backend == "triton" else 1
    ))  # fmt: skip
    with pytest.raises(ValueError, match=r"T 1: expected the reference's output to 0.01; got an error of"):
        soak_decode.main(SIZES)


def test_token_counts_reach_from_one_to_the_most(soak_decode):
    for count in (2, 24, 128):
        found = soak_decode.draw_token_counts(count, soak_decode.random.Random(0))
        assert len(set(found)) == count
        assert (min(found), max(found)) == (1, 128)


def test_a_row_says_what_came_out(soak_decode):
    args = soak_decode._parse(["--sizes", "64x32x16x4", "--policy", "queue"])
    row = soak_decode.make_row(args, [1, 128], (1000, 0, 0, 2.5), {"gpu": "An H200", "commit": "0123456"})
    assert row == {
        "op": "soak", "sizes": {"H": 64, "I": 32, "E": 16, "K": 4}, "dtype": "bfloat16", "policy": "queue",
        "tokens": [1, 128], "calls": 1000, "wrong_rows": 0, "flags": 0, "seconds": 2.5, "gpu": "An H200",
        "commit": "0123456",
    }  # fmt: skip
