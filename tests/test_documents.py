"""What the documents say is so: their code runs, what they name exists, their numbers come from committed rows."""

import ast
import importlib.util
import inspect
import json
import re
import runpy
import sys
import xml.etree.ElementTree as ElementTree
from contextlib import redirect_stderr, redirect_stdout
from dataclasses import MISSING, fields
from functools import cache
from importlib import import_module
from io import StringIO
from pathlib import Path

import pytest
import torch

import flash_moe
from flash_moe._activations import ACTIVATIONS
from flash_moe.cli import main
from flash_moe.modules.flash_moe import FlashMoEConfig
from flash_moe.ops import flash_decode, flash_expert, flash_mlp, flash_router
from flash_moe.training.environment import VARIABLES

ROOT = Path(__file__).resolve().parent.parent
# These have code and tables; the last two have only what they name.
RUN = [ROOT / "README.md", ROOT / "README_zh.md", *sorted((ROOT / "docs").glob("*.md"))]
ALL = [*RUN, ROOT / "CONTRIBUTING.md", ROOT / "CHANGELOG.md"]
# The first line of a block that is only compiled, and its imports run, where there is no GPU.
GPU_MARKER = "# needs a CUDA GPU"
# Without a GPU the quick start runs on fewer tokens; all else stays as it is written.
FEWER_TOKENS = ("torch.randn(1, 4096, 1024, ", "torch.randn(1, 128, 1024, ")

every_document = pytest.mark.parametrize("path", ALL, ids=lambda path: path.name)


def blocks(text, *languages):
    """(number of the first line, code) of every fenced block in one of the languages."""
    found = re.finditer(r"^```(\w*)\n(.*?)^```$", text, re.M | re.S)
    return [(text.count("\n", 0, m.start(2)) + 1, m[2]) for m in found if m[1] in languages]


def without_blocks(text):
    return re.sub(r"^```.*?^```$", "", text, flags=re.M | re.S)


def code_spans(text):
    return re.findall(r"`([^`\n]+)`", without_blocks(text))


def command_lines(text):
    """Lines of shell blocks without their comments, and code spans."""
    lines = [line.partition("  #")[0].strip() for _, code in blocks(text, "bash") for line in code.splitlines()]
    return [line for line in lines if line] + code_spans(text)


def without_tables(text):
    return re.sub(r"(<!-- table: .+? -->\n).*?(<!-- /table -->)", r"\1\2", text, flags=re.S)


def read(path):
    return path.read_text(encoding="utf-8")


# Code


@pytest.fixture(autouse=True)
def _one_thread():
    """Steps as small as those of the examples wait longer for threads than they compute."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def run_block(code, line, path, namespace):
    program = ast.parse("\n" * (line - 1) + code, str(path))  # tracebacks name the document's own line
    if code.startswith(GPU_MARKER) and not torch.cuda.is_available():
        program.body = [node for node in program.body if isinstance(node, (ast.Import, ast.ImportFrom))]
    exec(compile(program, str(path), "exec"), namespace)


def run_blocks(text, path):
    namespace = {"__name__": "document"}
    with torch.random.fork_rng(devices=range(torch.cuda.device_count())):
        for line, code in blocks(text, "python"):
            if not torch.cuda.is_available():
                code = code.replace(*FEWER_TOKENS)
            run_block(code, line, path, namespace)
    return namespace


@pytest.mark.parametrize("path", RUN, ids=lambda path: path.name)
def test_python_blocks_run(path):
    run_blocks(read(path), path)


def test_quick_start_is_written_at_its_full_size():
    for path in RUN[:2]:
        assert read(path).count(FEWER_TOKENS[0]) == 1
        assert blocks(read(path), "python")[0][1].count(FEWER_TOKENS[0]) == 1


@pytest.mark.parametrize(
    "code",
    [
        "1 / 0",
        f"{GPU_MARKER}\nfrom flash_moe.ops.flash_router import no_such_name",
        f"{GPU_MARKER}\nx = ",
        "x = 1\n  y",
    ],
    ids=["wrong", "import", "syntax", "indentation"],
)
def test_wrong_blocks_fail(code):
    with pytest.raises((ZeroDivisionError, ImportError, SyntaxError)):
        run_blocks(f"```python\n{code}\n```\n", Path("x.md"))


def test_blocks_share_a_namespace_and_their_line_numbers():
    text = "one\n```python\nx = 1\n```\n\n```python\ny = x + 1\n```\n"
    assert [line for line, _ in blocks(text, "python")] == [3, 7]
    assert run_blocks(text, Path("x.md"))["y"] == 2


EXAMPLES = {"layer.py": r"of it 0\.\d+ from the router", "swap_mlp.py": r"step 30  loss [\d.]+"}


def test_every_example_is_run():
    assert {path.name for path in (ROOT / "examples").glob("*.py")} == set(EXAMPLES)


@pytest.mark.parametrize("name", EXAMPLES)
def test_examples_run(name, capsys):
    with torch.random.fork_rng(devices=range(torch.cuda.device_count())):
        runpy.run_path(str(ROOT / "examples" / name), run_name="__main__")
    printed = capsys.readouterr().out
    assert re.search(EXAMPLES[name], printed)
    if name == "swap_mlp.py":
        losses = [float(number) for number in re.findall(r"loss ([\d.]+)", printed)]
        assert losses[-1] < 0.6 * losses[0]


def test_picture_can_be_drawn(tmp_path, monkeypatch):
    out = tmp_path / "picture.svg"
    monkeypatch.setattr(sys, "argv", ["how_it_works.py", str(out)])
    runpy.run_path(str(ROOT / "docs" / "figures" / "how_it_works.py"), run_name="__main__")
    for path in (out, ROOT / "docs" / "figures" / "how_it_works.svg"):
        root = ElementTree.parse(path).getroot()
        assert root.tag.endswith("svg")
        assert len(list(root.iter("{http://www.w3.org/2000/svg}path"))) > 144  # the squares of the grid


# What the documents name. Each of these gives a list of what is wrong.


def wrong_links(text, path):
    wrong = []
    for target in re.findall(r"\]\(([^)\s]+)\)", without_blocks(text)):
        if target.startswith(("https://", "http://")):
            continue
        file, _, anchor = target.partition("#")
        linked = path.parent / file if file else path
        if not linked.exists() or (anchor and anchor not in anchors(read(linked))):
            wrong.append(target)
    return wrong


def anchors(text):
    """GitHub's: lower case, spaces to hyphens, punctuation dropped."""
    titles = re.findall(r"^#+ (.+)$", without_blocks(text), re.M)
    return {re.sub(r"[^\w -]", "", title.lower()).replace(" ", "-") for title in titles}


def wrong_paths(text, path):
    """Anything under one of our folders, and the names of files in the root; ``*`` must match something."""
    named = re.findall(r"(?<![\w/.-])((?:flash_moe|tests|docs|benchmarks|examples|\.ci)/[\w./*-]*)", text)
    named = [name.rstrip(".") for name in named]
    named += [span for span in code_spans(text) if re.fullmatch(r"\w+\.(md|toml|txt)|Makefile|LICENSE", span)]
    # A page may name a page beside it.
    return [name for name in named if not any(path.parent.glob(name)) and not any(ROOT.glob(name))]


def wrong_node_ids(text, path):
    wrong = []
    for file, name in re.findall(r"(tests/\w+\.py)::(\w+)", text):
        if not (ROOT / file).exists() or name not in test_functions(ROOT / file):
            wrong.append(f"{file}::{name}")
    return wrong


@cache
def test_functions(path):
    return {node.name for node in ast.walk(ast.parse(read(path))) if isinstance(node, ast.FunctionDef)}


test_functions.__test__ = False  # a helper, for all its name


def wrong_make_targets(text, path):
    targets = re.findall(r"^([a-z]+):", read(ROOT / "Makefile"), re.M)
    named = [name for line in command_lines(text) for name in re.findall(r"^make (\S+)", line)]
    return [f"make {name}" for name in named if name not in targets]


def wrong_commands(text, path):
    """Commands of flash-moe that do not exist, or that lack an option which is named with them."""
    wrong = []
    for line in command_lines(text):
        for command in re.findall(r"^(?:flash-moe|python -m flash_moe) ([a-z]\S*)", line):
            lacking = set(re.findall(r"--[\w-]+", line)) - options_of(command)
            if not options_of(command) or lacking:
                wrong.append(line)
    return wrong


@cache
def options_of(command):
    """What ``flash-moe COMMAND --help`` lists; nothing if there is no such command."""
    out = StringIO()
    with pytest.MonkeyPatch.context() as patch, redirect_stdout(out), redirect_stderr(out):
        patch.setattr(sys, "argv", ["flash-moe", command, "--help"])
        for name, value in {"COLUMNS": "200", "TERM": "dumb", "NO_COLOR": "1"}.items():
            patch.setenv(name, value)
        with pytest.raises(SystemExit) as stopped:
            main()
    return set(re.findall(r"--[a-z][\w-]*", out.getvalue())) if stopped.value.code in (0, None) else set()


def wrong_names(text, path):
    """Dotted names in the package, and registered ops."""
    ops = re.findall(r"torch\.ops\.flash_moe\.(\w+)", text)
    names = re.findall(r"(?<![\w./-])flash_moe(?:\.[A-Za-z_]\w*)+", text)
    return [name for name in names if not exists(name)] + [op for op in ops if not hasattr(torch.ops.flash_moe, op)]


def exists(dotted):
    module, _, attribute = dotted.rpartition(".")
    try:
        # Not imported where it is a module: a kernel's needs Triton, which is not everywhere.
        return importlib.util.find_spec(dotted) is not None or hasattr(import_module(module), attribute)
    except ModuleNotFoundError:
        return hasattr(import_module(module), attribute) if importlib.util.find_spec(module) else False


def wrong_variables(text, path):
    known = set()
    for source in (ROOT / "flash_moe").rglob("*.py"):
        known |= set(re.findall(r"FLASH_MOE_[A-Z_]*[A-Z]", read(source)))
    return sorted(set(re.findall(r"FLASH_MOE_[A-Z_]*[A-Z]", text)) - known)


def typed_measurements(text, path):
    """Times, rates, speed-ups and results outside the tables that are made from rows."""
    unit = r"[TGM]i?B/s|T?FLOP/?s|tokens/s|词元/秒|ns|[µu]s|ms|s|毫秒|seconds?|minutes?|秒|分钟|bits per byte|倍"
    text = without_tables(text)
    found = re.findall(rf"(?<![\w.])\d[\d,.]* ?(?:{unit})(?!\w)", text)
    return found + re.findall(r"\d ?(?:×|x|times|%)(?: as)? (?:fast|slow|quick|more|less)\w*", text)


CHECKS = {
    wrong_links: "[text](docs/no_such_page.md) and [text](#no-such-heading)",
    wrong_paths: "flash_moe/ops/no_such_file.py, `no_such_page.md`, benchmarks/*.no_such_suffix",
    wrong_node_ids: "tests/test_router.py::test_no_such_thing and tests/test_no_such_file.py::test_router_forward",
    wrong_make_targets: "```bash\nmake nothing\n```\nand `make trouble`",
    wrong_commands: "`flash-moe nothing` and\n```bash\nflash-moe train --no-such-option 3   # really\n```",
    wrong_names: "from flash_moe.no_such_module and torch.ops.flash_moe.no_such_op",
    wrong_variables: "`FLASH_MOE_NO_SUCH_VARIABLE=1` and FLASH_MOE_NOR_THIS",
    typed_measurements: "It takes 3.2 ms and is 4 times faster.",
}


@every_document
@pytest.mark.parametrize("check", CHECKS, ids=lambda check: check.__name__)
def test_documents_say_what_is(check, path):
    assert check(read(path), path) == []


@pytest.mark.parametrize("check", CHECKS, ids=lambda check: check.__name__)
def test_each_check_can_fail(check):
    assert len(check(CHECKS[check], ROOT / "README.md")) >= 2


@pytest.mark.parametrize("check", [wrong_paths, wrong_node_ids, wrong_make_targets, wrong_commands, wrong_names])
def test_each_check_finds_something_to_check(check, monkeypatch):
    """Were nothing there, everything that the documents name would be wrong."""
    this, texts = sys.modules[__name__], [read(path) for path in RUN]
    nowhere = ROOT / "flash_moe" / "modules"
    monkeypatch.setattr(this, "ROOT", nowhere)
    monkeypatch.setattr(this, "read", lambda path: "")
    monkeypatch.setattr(this, "exists", lambda name: False)
    monkeypatch.setattr(this, "options_of", lambda command: set())
    assert any(check(text, nowhere / "README.md") for text in texts)


# What the documents repeat


def test_signatures_are_the_functions_own():
    shown = [line for path in RUN for _, code in blocks(read(path), "text") for line in code.splitlines()]
    functions = [
        getattr(module, name)
        for module in (flash_router, flash_expert, flash_mlp, flash_decode)
        for name in vars(module)
        if re.fullmatch(r"(triton_)?flash_\w+", name) and callable(getattr(module, name))
    ]
    assert len(functions) == 8
    for function in functions:
        parameters = inspect.signature(function).parameters.values()
        plain = inspect.Signature([each.replace(annotation=inspect.Parameter.empty) for each in parameters])
        assert f"{function.__name__}{plain}" in shown


def test_configuration_is_documented():
    rows = re.findall(r"^\| `(\w+)` \| (?:`([^`]+)`)? ?\| ", read(ROOT / "docs" / "architecture.md"), re.M)
    defaults = {each.name: "" if each.default is MISSING else repr(each.default) for each in fields(FlashMoEConfig)}
    assert {name: default for name, default in rows if name in defaults} == defaults


def test_activations_are_documented():
    rows = re.findall(r'^\| `"(\w+)"` \| ', read(ROOT / "docs" / "flash_expert.md"), re.M)
    assert [name for name in rows if name in ACTIVATIONS] == list(ACTIVATIONS)


def test_variables_are_documented():
    documented = re.findall(r"^\| `([A-Z_]+)` \| ", read(ROOT / "docs" / "environment.md"), re.M)
    used = {
        name
        for source in (ROOT / "flash_moe").rglob("*.py")
        for name in re.findall(r"""environ(?:\.get\(|\[)["'](\w+)""", read(source))
    }
    assert "FLASH_MOE_DEBUG" in used
    assert used | set(VARIABLES) <= set(documented)


def test_layers_are_those_of_the_contract():
    pyproject = read(ROOT / "pyproject.toml")
    contract = re.search(r'containers = \["flash_moe"\]\nlayers = \[\n(.*?)\n\]', pyproject, re.S)[1]
    layers = re.sub(r"[()]", "", " > ".join(re.findall(r'"(.+)"', contract)))
    for path in (ROOT / "CONTRIBUTING.md", ROOT / "docs" / "architecture.md"):
        assert layers in [" ".join(code.split()) for _, code in blocks(read(path), "text")], path.name


def test_limits_of_the_router_kernel_are_the_documented_ones():
    text = read(ROOT / "docs" / "flash_router.md")
    assert f"K above {flash_router.MAX_TRITON_EXPERTS_PER_TOK:,}" in text
    assert f"N above {flash_router.MAX_TRITON_EXPERT_KEYS:,}" in text


def test_requirements_are_those_of_the_package():
    pyproject = read(ROOT / "pyproject.toml")
    needed = {name: re.search(rf'"{name}>=([\d.]+)', pyproject)[1] for name in ("torch", "triton")}
    needed["Python"] = re.search(r'requires-python = ">=([\d.]+)"', pyproject)[1]
    for path in RUN[:2]:
        for name, version in needed.items():
            assert re.search(rf"{name} >= {re.escape(version)}\b", read(path)), (path.name, name)


def test_changelog_has_the_version():
    text = read(ROOT / "CHANGELOG.md")
    assert "[Unreleased]" in text or f"[{flash_moe.__version__}]" in text


# The two languages


def bare_code(text):
    """Blocks without comments, which may be translated."""
    python = [ast.unparse(ast.parse(code)) for _, code in blocks(text, "python")]
    shell = [re.sub(r" *#.*", "", code) for _, code in blocks(text, "bash")]
    return python, shell, blocks(text, "text")


def outline(text):
    return re.findall(r"^#+(?= )", without_blocks(text), re.M)


def targets(text):
    return sorted(re.findall(r"\]\(([^)\s]+)\)", text.replace("README_zh.md", "README.md")))


def spans(text):
    return sorted(set(code_spans(without_tables(text))))


SAME_IN_BOTH = {
    bare_code: ("```bash\nmake demo  # x\n```\n", "```bash\nmake test  # x\n```\n"),
    outline: ("# a\n## b\n", "# a\n### b\n"),
    targets: ("[a](docs/a.md)", "[a](docs/b.md)"),
    spans: ("`a`", "`b`"),
}


@pytest.mark.parametrize("part", SAME_IN_BOTH, ids=lambda part: part.__name__)
def test_both_languages_have_the_same(part):
    english, chinese = (without_tables(read(path)) for path in RUN[:2])
    assert part(english)
    assert part(english) == part(chinese)
    different = SAME_IN_BOTH[part]
    assert part(different[0]) != part(different[1])


def test_both_languages_have_the_same_tables():
    names = [re.findall(r"<!-- table: (.+?) -->", read(path)) for path in RUN[:2]]
    assert names[0] == names[1]
    assert "training" in names[0]


# Tables


def load_tables():
    spec = importlib.util.spec_from_file_location("tables", ROOT / "benchmarks" / "tables.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


tables = load_tables()

TIMING = {
    "op": "flash_router", "case": "T 4096, N 128, K 64", "backend": "triton", "pass": "forward",
    "time_us": [19.5, 20.0, 21.25], "gb_per_s": 1234.0, "gpu": "An H200", "torch": "2.13.0", "triton": "3.7.1",
    "commit": "0123456789abcdef", "date": "2026-01-02",
}  # fmt: skip
TRAINING = {
    "preset": "cpu", "cpu": "Some CPU", "threads": 2, "params": 2_500_000, "steps": 400, "tokens_per_s": 4321.0,
    "seconds": 200.4, "heldout_bits_per_byte": 2.34567, "torch": "2.13.0", "commit": "0123456789abcdef",
    "date": "2026-01-02T03:04:05Z",
}  # fmt: skip


@pytest.fixture
def root(tmp_path):
    """A repository with one document and no rows."""
    (tmp_path / "benchmarks" / "results").mkdir(parents=True)
    (tmp_path / "docs").mkdir()
    text = "".join(f"<!-- table: {name} -->\n<!-- /table -->\n" for name in ("training", "loss curve"))
    (tmp_path / "README.md").write_text("# a\n" + text + "the end\n")
    (tmp_path / "docs" / "router.md").write_text("<!-- table: gpu flash_router -->\nold\n<!-- /table -->\n")
    return tmp_path


def commit(root, *rows, file="rows.jsonl"):
    (root / "benchmarks" / "results" / file).write_text("".join(json.dumps(row) + "\n" for row in rows))


def written(root, name):
    assert tables.main(["--root", str(root)]) == 0
    assert tables.main(["--root", str(root), "--check"]) == 0
    return (root / name).read_text(encoding="utf-8")


def test_tables_are_those_of_the_committed_rows(capsys):
    assert tables.main(["--check"]) == 0, capsys.readouterr().out


def test_without_rows_a_table_says_so(root):
    assert written(root, "README.md").count("No row is committed yet.\n") == 2
    assert written(root, "README.md").endswith("the end\n")
    assert "old" not in written(root, "docs/router.md")


def test_stale_documents_are_found_and_left_alone(root, capsys):
    before = (root / "docs" / "router.md").read_text()
    assert tables.main(["--root", str(root), "--check"]) == 1
    assert "docs/router.md is stale" in capsys.readouterr().out
    assert (root / "docs" / "router.md").read_text() == before
    written(root, "README.md")
    commit(root, TRAINING)
    assert tables.main(["--root", str(root), "--check"]) == 1


def test_timings_are_grouped_compared_and_captioned(root):
    slower = {**TIMING, "backend": "reference", "time_us": [2000.0, 3000.0, 4000.0], "gb_per_s": None}
    earlier = {**TIMING, "time_us": [1.0, 1.0, 1.0]}
    other = {**TIMING, "pass": "backward", "case": {"T": 1, "N": 5}, "dtype": "bfloat16", "time_us": [200_000.0] * 3}
    commit(root, earlier, other, slower, TIMING)
    lines = written(root, "docs/router.md").splitlines()
    assert "| case | pass | backend | time, ms (p20 to p80) | speed-up | TB/s |" in lines
    assert "| T 4096, N 128, K 64 | forward | triton | 0.020 (0.019 – 0.021) | 150.00 × | 1.23 |" in lines
    assert "| T 4096, N 128, K 64 | forward | reference | 3.00 (2.00 – 4.00) | 1.00 × |  |" in lines
    assert "| T 1, N 5, bfloat16 | backward | triton | 200 (200 – 200) |  | 1.23 |" in lines
    assert "An H200, torch 2.13.0, triton 3.7.1, commit 0123456, 2026-01-02." in lines


def test_each_device_has_its_own_table(root):
    commit(root, TIMING, {**TIMING, "gpu": "Another", "time_us": [1.0, 2.0, 3.0]})
    text = written(root, "docs/router.md")
    assert text.count("| case |") == 2
    assert text.index("An H200") < text.index("0.002") < text.index("Another")


def test_training_runs_and_their_curve(root):
    (root / tables.LOSS_CURVE).parent.mkdir(parents=True)
    (root / tables.LOSS_CURVE).touch()
    (root / "README_zh.md").write_text("<!-- table: training -->\n<!-- /table -->\n")
    (root / "docs" / "a.md").write_text("<!-- table: loss curve -->\n<!-- /table -->\n")
    commit(root, TRAINING)
    expected = "| cpu | Some CPU, 2 threads | 2.5 M | 400 | 4,321 | 200 s | 2.346 |\n"
    assert expected in written(root, "README.md")
    assert "](benchmarks/results/train_gpu/loss.png)" in written(root, "README.md")
    assert "](../benchmarks/results/train_gpu/loss.png)" in written(root, "docs/a.md")
    assert expected.replace("threads", "线程") in written(root, "README_zh.md")


RESULT = {
    "kind": "result", "step": 2000, "heldout_bits_per_byte": 1.5, "train_seconds": 99.9, "tokens_per_s": 1e6,
    "parameters": 10**9, "device": "An H200, 140 GiB, compute capability 9.0",
    "flash_moe": "0.1.0 (commit abcdef0-dirty)", "torch": "2.13.0", "triton": "3.7.1", "date": "2026-01-02T03:04:05Z",
    "train": {
        "batch_size": 32,
        "model": {
            "num_layers": 8, "hidden_size": 512, "intermediate_size": 1024, "num_experts": 16384,
            "num_experts_per_tok": 32, "context_length": 1024,
        },
    },
}  # fmt: skip


def test_last_line_of_a_run_is_a_training_row(root):
    commit(root, RESULT, {**RESULT, "device": "Some CPU, 2 threads used of 64", "preset": "cpu"})
    text = written(root, "README.md")
    sizes = "L 8, H 512, E 16384, K 32"
    assert f"| {sizes} | An H200 | 1,000.0 M | 2,000 | 1,000,000 | 100 s | 1.500 |\n" in text
    assert "| cpu | Some CPU, 2 threads | 1,000.0 M |" in text
    assert "An H200, torch 2.13.0, triton 3.7.1, commit abcdef0-dirty, 2026-01-02.\n" in text


def test_tables_of_8_bits_are_compared_with_those_of_16(root):
    text = "<!-- table: gpu flash_expert_quantized -->\n<!-- /table -->\n"
    (root / "docs" / "quantized.md").write_text(text)
    row = {**TIMING, "op": "flash_expert_quantized", "case": "T 1, relative error 0.17 %", "dtype": "bfloat16"}
    commit(root, row, {**row, "case": "T 1, relative error 3.81 %", "dtype": "int8", "time_us": [4.0, 5.0, 6.0]})
    text = written(root, "docs/quantized.md")
    assert "| T 1, relative error 0.17 %, bfloat16 | forward | triton | 0.020 (0.019 – 0.021) | 1.00 × |" in text
    assert "| T 1, relative error 3.81 %, int8 | forward | triton | 0.005 (0.004 – 0.006) | 4.00 × |" in text


def test_the_last_soak_of_each_layer_is_shown(root):
    (root / "docs" / "decode.md").write_text("<!-- table: soak -->\n<!-- /table -->\n")
    assert "No row is committed yet.\n" in written(root, "docs/decode.md")
    row = {
        "op": "soak", "sizes": {"H": 64, "I": 32}, "dtype": "bfloat16", "policy": "auto", "tokens": [1, 128],
        "calls": 1000032, "wrong_rows": 0, "flags": 0, "seconds": 245.5, "gpu": "An H200", "torch": "2.13.0",
        "triton": "3.7.1", "commit": "0123456789abcdef", "date": "2026-01-02",
    }  # fmt: skip
    (root / tables.SOAKS).mkdir()
    commit(root, {**row, "wrong_rows": 7}, row, {**row, "policy": "queue", "calls": 32}, file="soak/an_h200.jsonl")
    lines = written(root, "docs/decode.md").splitlines()
    assert "| layer | T | calls | wrong rows | waits given up | time |" in lines
    assert "| H 64, I 32, bfloat16, auto | 1, 128 | 1,000,032 | 0 | 0 | 246 s |" in lines
    assert "| H 64, I 32, bfloat16, queue | 1, 128 | 32 | 0 | 0 | 246 s |" in lines
    assert "An H200, torch 2.13.0, triton 3.7.1, commit 0123456, 2026-01-02." in lines


def test_history_has_every_run_on_a_gpu_and_the_profile_is_the_last_ones(root):
    (root / "docs" / "a.md").write_text(
        "".join(f"<!-- table: {name} -->\n<!-- /table -->\n" for name in ("training history", "profile"))
    )
    assert written(root, "docs/a.md").count("No row is committed yet.\n") == 2
    plain = {**RESULT, "train": {"model": {**RESULT["train"]["model"], "backend": "reference"}}}
    parts = [{"name": "FlashMoE layers", "ms": 3.0, "launches": 12}, {"name": "attention", "ms": 1.0, "launches": 5}]
    last = {**RESULT, "tokens_per_s": 2e6, "profile": {"busy_ms": 4.0, "parts": parts}}
    alone = {
        **TIMING, "op": "FlashMoE", "case": "T 32768, H 512, I 1024, E 16384, K 32, CUDA graph",
        "backend": "triton, autocast", "pass": "forward_backward", "time_us": [240.0, 250.0, 260.0],
    }  # fmt: skip
    with (root / "docs" / "a.md").open("a") as file:
        file.write("<!-- table: gpu FlashMoE -->\n<!-- /table -->\n")
    commit(root, {**RESULT, "flash_moe": "0.1.0 (commit 1111111)"}, plain, last, TRAINING, alone)
    text = written(root, "docs/a.md")
    sizes = "L 8, H 512, E 16384, K 32"
    assert f"| {sizes} | An H200 | 1111111 | 1,000.0 M | 2,000 | 1,000,000 | 100 s | 1.500 |\n" in text
    assert f"| {sizes}, reference | An H200 | abcdef0-dirty |" in text
    assert "2,000,000" in text
    assert "4,321" not in text  # of a CPU
    assert "| FlashMoE layers | 3.00 | 75.0 % | 12 |\n" in text
    assert "| all | 4.00 | 100.0 % |  |\n" in text
    assert "A FlashMoE layer takes 0.38 ms, and 0.25 ms alone in a graph: 1.50 times that.\n" in text
    assert "1,000,000" not in written(root, "README.md")


def test_layers_of_the_committed_run_take_what_one_takes_alone():
    rows = tables.read_rows(ROOT / "benchmarks" / "results")
    run = [row for row in rows if row.get("profile") and row.get("gpu")][-1]
    assert 0.9 <= tables.layer_beside_itself(run, rows)["ratio"] <= 1.1


def test_first_losses_of_two_backends(root):
    (root / "docs" / "a.md").write_text("<!-- table: first losses -->\n<!-- /table -->\n")
    assert "No row is committed yet.\n" in written(root, "docs/a.md")
    row = {"step": 20, "loss": 2.5, "gpu": "An H200", "torch": "2.13.0", "commit": "0123456789", "date": "2026-01-02"}
    (root / tables.FIRST_LOSSES).parent.mkdir()
    rows = {**row, "backend": "auto"}, {**row, "backend": "auto", "step": 10, "loss": 3.25}, {**row, "backend": "torch"}
    more = {**row, "backend": "torch", "step": 10, "loss": 3.125}
    commit(root, *rows, more, file=tables.FIRST_LOSSES.relative_to("benchmarks/results"))
    text = written(root, "docs/a.md")
    assert "| step | loss, auto | loss, torch |\n" in text
    assert "| 10 | 3.2500 | 3.1250 |\n| 20 | 2.5000 | 2.5000 |\n" in text


def test_first_losses_of_both_committed_backends_are_the_same():
    """Before rounding has led the two runs apart."""
    rows = [json.loads(line) for line in (ROOT / tables.FIRST_LOSSES).read_text().splitlines()]
    ours, plain = ([row for row in rows if row["backend"] == backend] for backend in ("auto", "reference"))
    assert [row["learning_rate"] for row in ours] == [row["learning_rate"] for row in plain]
    for mine, other in zip(ours[:2], plain[:2], strict=True):
        assert mine["loss"] == pytest.approx(other["loss"], rel=2e-3)


def test_sparse_gradients_stand_beside_dense_ones(root):
    text = "<!-- table: sparse gradients -->\n<!-- /table -->\n<!-- table: gpu flash_expert -->\n<!-- /table -->\n"
    (root / "docs" / "a.md").write_text(text)
    dense = {**TIMING, "op": "flash_expert", "case": "T 1, E 4", "pass": "backward"}
    rows = [dense, {**dense, "backend": "reference"}, {**dense, "case": "T 1, E 8"}, TIMING, TRAINING]
    commit(root, *rows)
    assert written(root, "docs/a.md").startswith("<!-- table: sparse gradients -->\nNo row is committed yet.\n")
    commit(root, *rows, {**dense, "backend": "triton_sparse_grad", "time_us": [5.0, 5.0, 5.0]})
    table = written(root, "docs/a.md").split("<!-- /table -->")[0].splitlines()
    assert table[1:6] == [
        "| case | pass | backend | time, ms (p20 to p80) | TB/s |",
        "| --- | --- | --- | ---: | ---: |",
        "| T 1, E 4 | backward | triton | 0.020 (0.019 – 0.021) | 1.23 |",
        "| T 1, E 4 | backward | triton_sparse_grad | 0.005 (0.005 – 0.005) | 1.23 |",
        "",
    ]


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({**TIMING, "op": "no_such_op"}, "<!-- table: gpu no_such_op -->"),
        ({**TIMING, "gpu": None, "cpu": "x"}, "<!-- table: cpu flash_router -->"),
        ({**TIMING, "commit": None}, r"rows.jsonl, line 1: .*commit missing"),
        ({**TIMING, "pass": "sideways"}, "pass .*'sideways'"),
        ({**TIMING, "time_us": [3.0, 2.0, 1.0]}, r"time_us .*\[3.0, 2.0, 1.0\]"),
        ({**TRAINING, "seconds": None}, "seconds missing"),
        ({**TRAINING, "gpu": "x"}, "gpu or in cpu"),
        ({**RESULT, "flash_moe": "0.1.0"}, "commit missing"),
    ],
    ids=["op", "device", "field", "pass", "times", "training field", "two devices", "run without a commit"],
)
def test_rows_that_cannot_be_shown_are_refused(row, message, root):
    commit(root, row)
    with pytest.raises(ValueError, match=message):
        tables.main(["--root", str(root), "--check"])


def test_unknown_tables_are_refused(root):
    (root / "README.md").write_text("<!-- table: no such -->\n<!-- /table -->\n")
    with pytest.raises(ValueError, match=r"README.md: .*'no such'"):
        tables.main(["--root", str(root)])
