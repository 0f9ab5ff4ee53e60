"""The command line does what the library does, answers in text or JSON, and fails in one line with a telling code."""

import errno
import json
import os
import subprocess
import sys
from itertools import count
from unittest.mock import ANY

import jsonschema
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from safetensors.numpy import load_file, save_file

import lamella
from lamella.cli import run, text
from lamella.cli.app import app
from lamella.cli.schema import ERROR, keys, schema, schema_of
from lamella_engine.errors import BUG_EXIT_CODE
from lamella_engine.signing import load_key

VERBS = [command.callback.__name__ for command in app.registered_commands]

FIRST = {"b": np.array([0.1], np.float32), "w": np.array([0.5, -0.2, 0.8], np.float32)}
SECOND = {"b": np.array([0.2], np.float32), "w": np.array([0.6, -0.3, 0.9], np.float32)}

ERRORS = [
    value
    for value in vars(lamella).values()
    if isinstance(value, type) and issubclass(value, lamella.LamellaError) and value is not lamella.LamellaError
]

COST_KEYS = ("decoded_nbytes", "encoded_nbytes", "read_nbytes", "blob_count", "max_depth")

_names = count()


@pytest.fixture(autouse=True)
def _no_settings(monkeypatch):
    for name in ("LAMELLA_REPO", "LAMELLA_DEBUG", "LAMELLA_SIGNING_KEY"):
        monkeypatch.delenv(name, raising=False)


@pytest.fixture
def files(tmp_path):
    """Two checkpoints of one structure, as files."""
    paths = [tmp_path / "first.safetensors", tmp_path / "second.safetensors"]
    for path, tensors in zip(paths, (FIRST, SECOND), strict=True):
        save_file(tensors, path)
    return [str(path) for path in paths]


@pytest.fixture
def url(files):
    """A repository with bert@v1 and bert@v2 on main."""
    url = f"memory://cli-{next(_names)}"
    with lamella.init(url) as repo:
        repo.push(files[0], "bert@main", message="first", metrics={"loss": 0.5})
        repo.push(files[1], "bert@main", message="second\nwith more to say", recipe={"lr": 0.1})
    return url


@pytest.fixture
def call(url, capsys):
    """Run a command in the repository; returns code, stdout, stderr."""

    def call(*arguments):
        code = run(["-C", url, *map(str, arguments)])
        captured = capsys.readouterr()
        assert "Traceback" not in captured.err
        return code, captured.out, captured.err

    return call


@pytest.fixture
def answer(call):
    """Run a command that succeeds, with --json; returns its document, which is as the schema promises."""

    def answer(verb, *arguments):
        code, out, err = call(verb, *arguments, "--json")
        assert (code, err) == (0, "")
        return promised(verb, json.loads(out))

    return answer


@pytest.fixture
def says(call):
    """Run a command that succeeds; returns its text."""

    def says(*arguments):
        code, out, err = call(*arguments)
        assert (code, err) == (0, "")
        return out

    return says


@pytest.fixture
def fails(call):
    """Run a command that must fail with a code; returns its error as JSON, having checked that the text is one line."""

    def fails(code, *arguments):
        refused, out, line = call(*arguments)
        assert (refused, out) == (code, "")
        assert line.startswith("lamella: ")
        assert line.count("\n") == 1
        refused, out, document = call(*arguments, "--json")
        assert (refused, out) == (code, "")
        error = promised(ERROR, json.loads(document))["error"]
        assert line == f"lamella: {text.printable(error['message'])}\n"
        return error

    return fails


def promised(name, document):
    """Return a document, having checked that it is what the schema says."""
    jsonschema.Draft202012Validator(schema_of(name)).validate(document)
    return document


def process(*arguments, **options):
    """Run the command line as a process of its own."""
    program = "import sys; from lamella.cli import main; sys.exit(main())"
    options = {"capture_output": True, "timeout": 120} | options
    return subprocess.run([sys.executable, "-c", program, *map(str, arguments)], check=False, **options)


# -- each verb ---------------------------------------------------------------------------------------------------------


def test_init_makes_a_repository_that_the_other_verbs_open(tmp_path, call, answer):
    assert answer("init", tmp_path / "one") == {"repository": str(tmp_path / "one")}
    assert call("-C", tmp_path / "two", "init", "--max-depth", 3)[0] == 0
    for name in ("one", "two"):
        with lamella.open(tmp_path / name) as repo:
            assert repo.models() == []


def test_a_depth_out_of_bounds_is_refused_and_nothing_is_made(tmp_path, fails):
    assert fails(2, "init", tmp_path / "one", "--max-depth", 32)["kind"] == "bad_option"
    assert not (tmp_path / "one").exists()


def test_push_stores_the_file_and_everything_said_about_it(answer, url, files, tmp_path):
    recipe = tmp_path / "recipe.json"
    recipe.write_text('{"steps": [1, 2.5], "optimizer": "AdamW", "größe": null}')
    document = answer(
        "push", files[0], "bert@main", "-m", "third", "--parent", "bert@v2", "--metric", "loss=0.25", "--metric",
        "epoch=3", "--recipe", recipe,
    )  # fmt: skip
    assert (document["model"], document["number"], document["new"]) == ("bert", 3, True)
    version = lamella.open(url).version("bert@main")
    assert (version.id, version.message) == (document["id"], "third")
    assert version.recipe == document["recipe"] == {"steps": [1, 2.5], "optimizer": "AdamW", "größe": None}
    assert version.metrics == {"loss": 0.25, "epoch": 3}
    assert isinstance(version.metrics["epoch"], int)


def test_push_of_what_is_there_says_that_it_stored_nothing(answer, says, files):
    again = ("push", files[0], "bert@other")
    assert "pushed bert@v3" in says(*again)
    assert "nothing new was stored" in says(*again)
    assert answer(*again)["new"] is False


def test_a_metric_that_is_not_finite_is_a_string_in_json(answer, files):
    document = answer("push", files[0], "bert@main", "--metric", "loss=nan", "--metric", "gain=-inf")
    assert document["metrics"] == {"loss": "NaN", "gain": "-Infinity"}


def test_checkout_gives_the_file_back_byte_for_byte(answer, says, files, tmp_path):
    out = tmp_path / "out"
    document = answer("checkout", "bert@main~1", out)
    with open(files[0], "rb") as file:
        pushed = file.read()
    assert document["files"] == [{"path": "first.safetensors", "nbytes": len(pushed)}]
    assert (document["model"], document["number"], document["out"]) == ("bert", 1, str(out))
    assert (out / "first.safetensors").read_bytes() == pushed
    assert "first.safetensors" in says("checkout", "bert@v1", out)  # the same again is fine


def test_checkout_selects_by_include_and_exclude(answer, tmp_path):
    document = answer(
        "checkout", "bert@main", tmp_path / "out", "--include", "b", "--include", "w*", "--exclude", "b",
        "--verify", "chunk",
    )  # fmt: skip
    (path,) = (file["path"] for file in document["files"] if file["path"].endswith(".safetensors"))
    found = load_file(tmp_path / "out" / path)
    assert list(found) == ["w"]
    assert found["w"].tobytes() == SECOND["w"].tobytes()


def test_checkout_replaces_a_file_that_differs_only_if_told_to(fails, says, tmp_path, files):
    there = tmp_path / "out" / "first.safetensors"
    there.parent.mkdir()
    there.write_bytes(b"edited")
    fails(4, "checkout", "bert@v1", there.parent)
    assert there.read_bytes() == b"edited"
    says("checkout", "bert@v1", there.parent, "--overwrite")
    with open(files[0], "rb") as file:
        assert there.read_bytes() == file.read()


def test_distance_is_that_of_the_library(answer, says, url):
    document = answer("distance", "bert@v1", "bert@v2")
    found = lamella.open(url).distance("bert@v1", "bert@v2")
    assert (document["l2"], document["l1"], document["linf"]) == (found.l2, found.l1, found.linf)
    assert document["per_tensor"]["w"]["l2"] == found.per_tensor["w"].l2
    assert document["cosine"] is None
    assert f"{found.l2:.6g}" in says("distance", "bert@v1", "bert@v2")
    assert "0 of 2 tensors differ" in says("distance", "bert@v1", "bert@v1")


def test_distance_lists_the_largest_change_first(says, url):
    base = {name: np.zeros(8, np.float32) for name in "abcd"}
    far = {
        "a": np.r_[np.float32(3), base["a"][1:]],
        "b": np.full(8, 2, np.float32),
        "c": np.full(8, np.nan, np.float32),
        "d": base["d"],
    }
    with lamella.open(url) as repo:
        repo.push(base, "far@main")
        repo.push(far, "far@main")

    def names(*arguments):
        lines = says("distance", "far@v1", "far@v2", *arguments).splitlines()
        assert lines[-1] == "3 of 4 tensors differ"
        assert lines[-2].startswith("all ")
        return [line.split()[0] for line in lines[1:-2]]

    assert names() == names("--by", "l1") == ["c", "b", "a"]  # what is no number wants looking at most
    assert names("--by", "linf") == ["c", "a", "b"]
    assert names("--by", "changed") == ["b", "c", "a"]
    assert names("--by", "name") == ["a", "b", "c"]
    assert names("-n", "2") == ["c", "b", "..."]
    assert "... and 2 more: -n 3 shows them all" in says("distance", "far@v1", "far@v2", "-n", "1")


def test_distance_takes_a_selection_and_measures_the_cosine_when_asked(answer, says, url):
    document = answer("distance", "bert@v1", "bert@v2", "--include", "w", "--cosine")
    assert list(document["per_tensor"]) == ["w"]
    assert document["cosine"] == lamella.open(url).distance("bert@v1", "bert@v2", include="w").cosine
    assert "cosine" in says("distance", "bert@v1", "bert@v2", "--cosine")


def test_log_lists_newest_first_and_at_most_n(answer, says):
    versions = answer("log", "bert@main")["versions"]
    assert [version["number"] for version in versions] == [2, 1]
    assert versions[0]["parents"] == [versions[1]["id"]]
    assert [version["refs"] for version in versions] == [["main"], []]
    assert [version["number"] for version in answer("log", "bert@main", "-n", "1")["versions"]] == [2]
    lines = says("log", "bert@main").splitlines()
    assert [line.split()[0] for line in lines] == ["bert@v2", "bert@v1"]
    assert lines[0].startswith("bert@v2  (main)")
    assert lines[0].endswith("second")
    assert lines[1].endswith("first  loss=0.5")


@pytest.fixture
def forked(answer, files):
    """Besides main at bert@v2, trial at bert@v3, which is a child of v1, and v2 has an alias too."""
    answer("push", files[0], "bert@trial", "--parent", "bert@v1", "-m", "third")
    answer("alias", "bert@production", "bert@v2")


def test_log_draws_every_ref_of_a_model(says, forked):
    drawn = [line.split("  ")[:2] for line in says("log", "--graph", "bert").splitlines()]
    assert drawn == [["* bert@v3", "(trial)"], ["| * bert@v2", "(main, production)"], ["|/"], ["* bert@v1", ANY]]
    drawn = says("log", "--graph", "-n", "2", "bert").splitlines()
    assert [line.split("  ")[0] for line in drawn] == ["* bert@v3", "| * bert@v2"]


def test_log_of_several_revisions_has_each_version_once(answer, forked):
    def numbers(*arguments):
        return [version["number"] for version in answer("log", *arguments)["versions"]]

    assert numbers("bert@main", "bert@trial") == [3, 2, 1]
    assert numbers("bert@main", "bert@v1") == numbers("bert@main", "--graph") == [2, 1]
    assert numbers("bert") == [3, 2, 1]
    assert numbers("bert", "-n", "1") == [3]


def test_log_of_a_model_without_refs_starts_at_its_latest_version(answer):
    answer("branch", "--delete", "bert@main")
    assert [version["number"] for version in answer("log", "bert")["versions"]] == [2, 1]


def test_log_draws_a_parent_of_another_model_below_its_child(says, files, url):
    with lamella.open(url) as repo:
        repo.push(files[0], "gpt@main", parent="bert@v2")
    assert [line.split()[1] for line in says("log", "--graph", "gpt").splitlines()] == ["gpt@v1", "bert@v2", "bert@v1"]


def test_show_has_the_metadata_every_tensor_and_what_a_checkout_costs(answer, says, url):
    (document,) = answer("show", "bert@v2")["versions"]
    cost = lamella.open(url).cost("bert@v2")
    assert document["refs"] == ["main"]
    assert document["checkout"] == {key: getattr(cost, key) for key in COST_KEYS}
    assert document["tensors"] == [
        {"name": name, "dtype": "float32", "shape": [length]}
        | {key: getattr(cost.per_tensor[name], key) for key in COST_KEYS}
        for name, length in (("b", 1), ("w", 3))
    ]
    assert [tensor["decoded_nbytes"] for tensor in document["tensors"]] == [4, 12]
    out = says("show", "bert@v2")
    for part in (
        document["id"],
        "second.safetensors",
        "second\n    with more to say",
        '{"lr": 0.1}',
        "(3)    12 bytes",
    ):
        assert part in out
    assert out.splitlines()[-1] == (
        f"a checkout reads {text.size(cost.read_nbytes)} in {text.count(cost.blob_count, 'blob')}, "
        f"chains up to {cost.max_depth} deep, for 16 bytes"
    )


def test_show_takes_several_revisions(answer, says):
    documents = answer("show", "bert@v2", "bert@v1")["versions"]
    assert [document["number"] for document in documents] == [2, 1]
    assert documents == [answer("show", revision)["versions"][0] for revision in ("bert@v2", "bert@v1")]
    assert says("show", "bert@v2", "bert@v1") == says("show", "bert@v2") + "\n" + says("show", "bert@v1")


@pytest.fixture
def grown(answer, files):
    """bert@v3 on another branch, where b has another shape and c is new."""
    save_file({"w": FIRST["w"], "b": np.zeros(20, np.float64), "c": np.zeros(1, np.int8)}, files[0])
    answer("push", files[0], "bert@other")


def test_diff_says_what_became_of_each_tensor(answer, grown):
    b = {"dtype": "float32", "shape": [1], "decoded_nbytes": 4}
    w = {"dtype": "float32", "shape": [3], "decoded_nbytes": 12}
    assert answer("diff", "bert@v1", "bert@v3") == {
        "a": "bert@v1",
        "b": "bert@v3",
        "tensors": [
            {
                "name": "b",
                "change": "reshaped",
                "a": b,
                "b": {"dtype": "float64", "shape": [20], "decoded_nbytes": 160},
            },
            {"name": "c", "change": "added", "a": None, "b": {"dtype": "int8", "shape": [1], "decoded_nbytes": 1}},
            {"name": "w", "change": "same", "a": w, "b": w},
        ],
    }


def test_diff_lists_the_largest_first_or_by_name_and_says_what_it_left_out(says, grown):
    reshaped, changed = "# b  float32 -> float64  (1) -> (20)  4 bytes -> 160 bytes", "~ w  float32             (3)"
    lines = says("diff", "bert@v2", "bert@v3").splitlines()
    assert lines[0] == reshaped
    assert lines[1].startswith(changed)
    assert lines[2].startswith("+ c  int8")
    assert lines[3] == "1 added (+), 0 removed (-), 1 reshaped (#), 1 changed (~), 0 the same"
    by_name = says("diff", "bert@v2", "bert@v3", "--by", "name").splitlines()
    assert [line[:3] for line in by_name[:3]] == ["# b", "+ c", "~ w"]
    lines = says("diff", "bert@v2", "bert@v3", "-n", "1").splitlines()
    assert lines[:2] == [reshaped, "... and 2 more: -n 3 shows them all"]
    assert len(lines) == 3
    assert says("diff", "bert@v3", "bert@v2").splitlines()[2].startswith("- c")


def test_diff_of_one_revision_is_what_it_changed(answer, says, fails):
    assert answer("diff", "bert@main") == answer("diff", "bert@main~1", "bert@main")
    assert (
        says("diff", "bert@v1", "bert@v1") == "0 added (+), 0 removed (-), 0 reshaped (#), 0 changed (~), 2 the same\n"
    )
    fails(3, "diff", "bert@v1")


@pytest.mark.parametrize("kind", ["branch", "tag", "alias"])
def test_a_ref_is_set_listed_and_deleted(kind, answer, says, fails):
    ref = {"model": "bert", "name": "here", "kind": kind, "number": 1}
    assert answer(kind, "bert@here", "bert@v1") == {"ref": ref}
    assert ref in answer(kind)["refs"]
    assert "bert@here" in says(kind)
    assert answer(kind, "--delete", "bert@here", "--dry-run") == {"deleted": ref, "dry_run": True}
    assert says(kind, "bert@here", "--delete", "--dry-run").startswith("would delete")
    assert ref in answer(kind)["refs"]
    assert says(kind, "--delete", "bert@here").startswith("deleted")
    assert ref not in answer(kind)["refs"]
    assert fails(3, kind, "--delete", "bert@here")["kind"] == "ref_not_found"


def test_a_list_has_refs_of_its_kind_of_all_models(answer, says, files):
    answer("push", files[0], "gpt@main")
    answer("tag", "gpt@one", "gpt@v1")
    assert [(ref["model"], ref["name"]) for ref in answer("branch")["refs"]] == [("bert", "main"), ("gpt", "main")]
    assert [(ref["model"], ref["name"]) for ref in answer("tag")["refs"]] == [("gpt", "one")]
    assert says("alias") == "there are none\n"


def test_a_ref_is_not_deleted_as_one_of_another_kind(answer, fails):
    answer("tag", "bert@release", "bert@v1")
    assert "lamella tag" in fails(2, "branch", "--delete", "bert@release")["message"]
    assert len(answer("tag")["refs"]) == 1


def test_stats_are_those_of_the_library(answer, says, url):
    found = lamella.open(url).stats()
    document = answer("stats")
    assert document == {key: getattr(found, key) for key in found.__slots__} | {"ratio": found.ratio}
    assert text.size(found.stored_nbytes) in says("stats")


def test_verify_finds_nothing_in_a_sound_repository(answer, says):
    document = answer("verify", "--deep")
    assert (document["ok"], document["deep"], document["versions"], document["problems"]) == (True, True, 2, [])
    assert says("verify").startswith("no problems in ")


def test_verify_exits_with_6_and_names_each_problem(tmp_path, files, call):
    with lamella.init(tmp_path / "repo") as repo:
        repo.push(files[0], "bert@main")
    pack = next((tmp_path / "repo" / "packs").rglob("*-*"))
    octets = bytearray(pack.read_bytes())
    octets[len(octets) // 3] ^= 1
    pack.write_bytes(octets)
    code, out, err = call("-C", tmp_path / "repo", "verify", "--json")
    document = json.loads(out)
    assert (code, err, document["ok"]) == (6, "", False)
    assert set(document["problems"][0]) == {"kind", "message", "where"}
    code, out, err = call("-C", tmp_path / "repo", "verify")
    assert (code, err) == (6, "")
    assert document["problems"][0]["message"] in out


def test_the_version_is_that_of_the_distribution(answer, says):
    assert says("version") == says("--version") == f"lamella {answer('version')['version']}\n"


def test_signers_lists_whose_signatures_are_required_and_requires_them(answer, says, fails, tmp_path, monkeypatch):
    assert says("signers") == "nothing has to be signed\n"
    assert fails(5, "signers", "--require")["kind"] == "no_signing_key"
    public = answer("keygen", tmp_path / "ada.pem")["public_key"]
    monkeypatch.setenv("LAMELLA_SIGNING_KEY", str(tmp_path / "ada.pem"))
    assert fails(2, "signers", public)["kind"] == "usage"
    assert answer("signers", "--require")["signers"] == [public]
    assert answer("signers")["signers"] == [public]
    assert says("signers", "--require", "0" * 64, public) == f"{'0' * 64}\n{public}\n"
    monkeypatch.delenv("LAMELLA_SIGNING_KEY")
    assert fails(5, "signers", "--require", public)["kind"] == "not_a_signer"


def test_keygen_makes_a_key_that_signs_and_never_writes_over_anything(answer, says, fails, tmp_path):
    document = answer("keygen", tmp_path / "one")
    assert document["path"] == str(tmp_path / "one")
    assert load_key(tmp_path / "one").public.hex() == document["public_key"]
    said = says("keygen", tmp_path / "two")
    assert load_key(tmp_path / "two").public.hex() in said
    assert fails(4, "keygen", tmp_path / "one")["kind"] == "file_exists"


# -- help and schema ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("verb", VERBS)
def test_the_help_of_a_verb_has_an_example_and_the_keys(verb, says):
    out = says(verb, "--help")
    assert out.count("Example:") == 1
    assert f"lamella {verb}" in out.split("Example:")[1] or f"lamella -C weights {verb}" in out.split("Example:")[1]
    assert f"With --json: {keys(verb)}." in " ".join(out.split())
    assert out == says(verb, "-h")


def test_the_keys_are_those_of_the_schema():
    assert keys("stats") == "models, versions, packs, decoded_nbytes, stored_nbytes, ratio"
    assert keys("checkout") == "model, number, id, out, format, files [{path, nbytes}]"
    assert keys("tag") == "refs [{model, name, kind, number}]; or ref {model, name, kind, number}; or " + (
        "deleted {model, name, kind, number}, dry_run"
    )


def test_the_schema_has_every_verb_and_is_a_schema():
    definitions = schema()["$defs"]
    assert {name for name in definitions if name.islower()} == {*VERBS, ERROR}
    jsonschema.Draft202012Validator.check_schema(schema())


def test_no_document_may_have_a_key_that_the_schema_lacks():
    def objects(part):
        """Yield the definitions of objects that stand in documents as they are."""
        if isinstance(part, dict):
            if "properties" in part:
                yield part
            for inner in part.values():
                yield from objects(inner)
        elif isinstance(part, list):
            for inner in part:
                yield from objects(inner)

    extended = {
        name for name, part in schema()["$defs"].items() if "add keys of their own" in part.get("description", "")
    }
    documents = [part for name, part in schema()["$defs"].items() if name not in extended]
    found = [part for document in documents for part in objects(document)]
    assert len(found) > len(VERBS)
    for part in found:
        assert part.get("additionalProperties") is False or part.get("unevaluatedProperties") is False
        assert set(part["required"]) == set(part["properties"])
    for name in extended:
        uses = [part for part in _parts(schema()) if part.get("$ref") == f"#/$defs/{name}"]
        assert all("unevaluatedProperties" in part or part == {"$ref": f"#/$defs/{name}"} for part in uses)


def _parts(part):
    if isinstance(part, dict):
        yield part
    for inner in part.values() if isinstance(part, dict) else part if isinstance(part, list) else ():
        yield from _parts(inner)


def test_schema_prints_what_a_verb_promises_and_nothing_else(answer, says, fails):
    assert answer("schema") == json.loads(says("schema")) == schema()
    for name in [*VERBS, ERROR]:
        document = answer("schema", name)
        assert document == schema_of(name)
        jsonschema.Draft202012Validator.check_schema(document)
    assert set(answer("schema", "stats")["$defs"]) == {"stats", "Count"}
    assert "init, push," in fails(2, "schema", "puhs")["message"]


def test_the_help_lists_every_verb(says):
    out = says("--help")
    assert all(f"\n  {verb} " in out for verb in VERBS)


def test_without_a_verb_the_help_is_on_stderr(call):
    code, out, err = call()
    assert (code, out) == (2, "")
    assert "Usage: lamella" in err


# -- which repository --------------------------------------------------------------------------------------------------


def test_the_repository_is_that_of_c_then_of_the_environment_then_the_directory(tmp_path, monkeypatch, capsys, files):
    for place in ("option", "environment", "directory"):
        with lamella.init(tmp_path / place) as repo:
            repo.push(files[0], f"{place}@main")

    def models(*arguments):
        assert run([*arguments, "branch", "--json"]) == 0
        return [ref["model"] for ref in json.loads(capsys.readouterr().out)["refs"]]

    monkeypatch.chdir(tmp_path / "directory")
    assert models() == ["directory"]
    monkeypatch.setenv("LAMELLA_REPO", str(tmp_path / "environment"))
    assert models() == ["environment"]
    assert models("-C", str(tmp_path / "option")) == ["option"]
    monkeypatch.setenv("LAMELLA_REPO", "")
    assert models() == ["directory"]


def test_an_absent_repository_is_not_found(fails, tmp_path):
    assert fails(3, "-C", tmp_path / "nowhere", "stats")["kind"] == "repository_not_found"
    assert fails(3, "-C", tmp_path, "stats")["kind"] == "repository_not_found"
    assert fails(2, "-C", "", "stats")["kind"] == "bad_url"
    assert fails(4, "init")["kind"] == "repository_exists"


# -- failure -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "arguments",
    [
        ["frobnicate"],
        ["--unknown", "stats"],
        ["stats", "--unknown"],
        ["stats", "extra"],
        ["show"],
        ["push", "model.safetensors"],
        ["log", "bert@main", "-n", "0"],
        ["log", "bert@main", "-n", "many"],
        ["checkout", "bert@main", "out", "--verify", "never"],
        ["branch", "bert@x"],
        ["branch", "--delete"],
        ["branch", "--delete", "bert@x", "bert@v1"],
        ["tag", "bert@x", "bert@v1", "--dry-run"],
    ],
    ids=" ".join,
)
def test_wrong_usage_exits_with_2(arguments, fails):
    assert fails(2, *arguments)["kind"] == "usage"


@pytest.mark.parametrize(
    ("code", "revision"),
    [
        (2, "berta@"),
        (2, ""),
        (2, "../x@main"),
        (2, "bert@main~"),
        (2, "a\x1b[2Jb@main"),
        (2, "bert@" + "x" * 300),
        (3, "bert@nowhere"),
        (3, "gpt@main"),
        (3, "bert@v3"),
        (3, "bert@main~2"),
        (3, "bert@best:accuracy"),
        (3, "0123456789abcdef"),
    ],
)
def test_a_revision_that_names_nothing_is_refused(code, revision, fails, tmp_path):
    for arguments in (["show"], ["log"], ["diff", "bert@main"], ["distance", "bert@main"], ["alias", "bert@here"]):
        fails(code, *arguments, revision)
    fails(code, "checkout", revision, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_model_that_is_not_there_is_told_from_one_that_is(fails, says):
    assert fails(3, "log", "berta")["message"] == "there is no model berta: did you mean bert?"
    assert fails(3, "show", "gpt@main")["message"] == "there is no model gpt: there are bert"
    assert fails(2, "show", "bert")["kind"] == "bad_revision"


def test_a_slip_is_told_what_was_meant(fails):
    assert fails(2, "pussh")["message"] == "no such command 'pussh'. Did you mean 'push'? See lamella --help"
    assert "--message" in fails(2, "push", "--mesage", "x")["message"]
    message = fails(2, "checkout", "bert@main", "out", "--verify", "never")["message"]
    assert message == "invalid value for '--verify': 'never' is not one of 'blob', 'chunk': see lamella checkout --help"


def test_what_follows_two_dashes_is_no_option(call):
    code, _, err = call("show", "--", "--json")
    assert (code, err[:18]) == (2, "lamella: '--json' ")


def test_a_recipe_must_be_json(fails, files, tmp_path):
    recipe = tmp_path / "recipe.json"
    assert fails(3, "push", files[0], "bert@main", "--recipe", recipe)["kind"] == "file_not_found"
    for content in (b"", b"{", b"\xff", b'{"a": 1, "a": 2}', b"NaN", b"[" * 100_000):
        recipe.write_bytes(content)
        assert fails(2, "push", files[0], "bert@main", "--recipe", recipe)["kind"] == "bad_json"


@pytest.mark.parametrize("metric", ["loss", "=1", "loss=", "loss=low", "loss=1=x"])
def test_a_metric_must_be_a_name_and_a_number(metric, fails, files):
    assert fails(2, "push", files[0], "bert@main", "--metric", metric)["kind"] == "bad_metric"


def test_a_metric_is_given_once(fails, files):
    assert "twice" in fails(2, "push", files[0], "bert@main", "--metric", "a=1", "--metric", "a=2")["message"]


def test_a_source_must_hold_a_checkpoint(fails, tmp_path):
    fails(3, "push", tmp_path / "nowhere.safetensors", "bert@main")
    (tmp_path / "empty").mkdir()
    fails(2, "push", tmp_path / "empty", "bert@main")
    (tmp_path / "text").write_text("these are no weights")
    fails(2, "push", tmp_path / "text", "bert@main")


def test_a_conflict_tells_where_the_branch_is(fails, files, url):
    error = fails(4, "push", files[0], "bert@main", "--parent", "bert@v1")
    repo = lamella.open(url)
    assert error["context"] == {"expected": repo.version("bert@v1").id, "actual": repo.version("bert@v2").id}


@pytest.mark.parametrize("error", ERRORS, ids=lambda error: error.__name__)
def test_each_error_has_the_exit_code_of_its_class(error, fails, monkeypatch):
    def failing(url):
        raise error("it went wrong: do this", why="because")

    monkeypatch.setattr(lamella, "open", failing)
    assert fails(error.exit_code, "stats") == {
        "kind": error.default_kind,
        "message": "it went wrong: do this",
        "context": {"why": "because"},
    }


@pytest.mark.parametrize(
    ("code", "error"),
    [
        (5, PermissionError(errno.EACCES, "Permission denied", "/x")),
        (7, OSError(errno.EIO, "Input/output error", "/x")),
    ],
)
def test_what_the_system_refuses_is_no_bug(code, error, fails, monkeypatch):
    monkeypatch.setattr(lamella, "open", _raising(error))
    assert "/x" in fails(code, "stats")["message"]


@pytest.mark.parametrize("bug", [RuntimeError("deliberate"), KeyError("deliberate"), AssertionError(), EOFError()])
def test_a_bug_is_one_line_that_says_how_to_see_more(bug, fails, monkeypatch):
    monkeypatch.setattr(lamella, "open", _raising(bug))
    error = fails(BUG_EXIT_CODE, "stats")
    assert error["kind"] == "bug"
    assert type(bug).__name__ in error["message"]
    assert "LAMELLA_DEBUG=1" in error["message"]


def test_debugging_shows_the_traceback(url, monkeypatch, capsys):
    monkeypatch.setattr(lamella, "open", _raising(RuntimeError("deliberate")))
    monkeypatch.setenv("LAMELLA_DEBUG", "1")
    assert run(["-C", url, "stats"]) == BUG_EXIT_CODE
    assert "Traceback" in capsys.readouterr().err


def _raising(error):
    def raising(*_, **__):
        raise error

    return raising


# -- what reaches the terminal -----------------------------------------------------------------------------------------

HOSTILE = "a\x1b[2J\x07\r\n\x9b\u202eb\u2028\udc80"


def test_names_and_messages_cannot_drive_the_terminal(call, url):
    with lamella.open(url) as repo:
        repo.push({HOSTILE[:-1]: np.zeros(2, np.float32)}, "evil@main", message=HOSTILE[:-1], metrics={HOSTILE[:-1]: 1})
    for arguments in (
        ["show", "evil@main"],
        ["log", "evil@main"],
        ["diff", "evil@main", "bert@main"],
        ["distance", "evil@main", "evil@main"],
        ["checkout", "evil@main", f"/nowhere{HOSTILE}/\0"],
        ["show", HOSTILE],
        [HOSTILE],
        ["push", HOSTILE, "bert@main"],
    ):
        _, out, err = call(*arguments)
        assert all(line.isprintable() for line in (out + err).split("\n"))
        _, out, err = call(*arguments, "--json")
        assert (out + err).isascii()
        json.loads(out or err)


@given(st.text())
def test_printable_text_is_printable_and_stays_what_it_is(given_text):
    escaped = text.printable(given_text)
    assert escaped.isprintable()
    assert text.printable(escaped) == escaped
    assert (escaped == given_text) == given_text.isprintable()
    assert escaped.encode().decode() == escaped


@pytest.mark.parametrize(
    ("nbytes", "said"),
    [
        (0, "0 bytes"),
        (1, "1 byte"),
        (1023, "1023 bytes"),
        (1024, "1.0 KiB"),
        ((1 << 20) - 1, "1.0 MiB"),
        (90_868_376, "86.7 MiB"),
        (3 << 40, "3.0 TiB"),
        (5 << 50, "5.0 PiB"),
    ],
)
def test_sizes_have_units(nbytes, said):
    assert text.size(nbytes) == said


# -- as a process ------------------------------------------------------------------------------------------------------


@pytest.fixture
def on_disk(tmp_path, files):
    with lamella.init(tmp_path / "weights") as repo:
        repo.push(files[0], "bert@main", message="größe")
    return tmp_path / "weights"


def test_help_imports_neither_torch_nor_zarr_nor_ray_nor_rich():
    program = (
        "import sys\nfrom lamella.cli import run\nassert run(['--help']) == 0\n"
        "print({'torch', 'zarr', 'ray', 'rich'} & sys.modules.keys(), file=sys.stderr)"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert done.stderr == "set()\n"


def test_a_reader_that_goes_away_is_no_failure_to_shout_about(on_disk):
    read, write = os.pipe()
    os.close(read)
    done = process("-C", on_disk, "show", "bert@main", capture_output=False, stdout=write, stderr=subprocess.PIPE)
    os.close(write)
    assert (done.returncode, done.stderr) == (141, b"")


def test_a_full_disk_under_stdout_is_a_storage_error(on_disk):
    with open("/dev/full", "w") as full:
        done = process("-C", on_disk, "stats", capture_output=False, stdout=full, stderr=subprocess.PIPE)
    assert done.returncode == 7
    assert done.stderr.startswith(b"lamella: No space left on device")
    assert done.stderr.count(b"\n") == 1


def test_an_error_that_nobody_can_be_told_keeps_its_exit_code(on_disk):
    with open("/dev/full", "w") as full:
        done = process("-C", on_disk, "show", "nope@main", capture_output=False, stdout=subprocess.PIPE, stderr=full)
    assert (done.returncode, done.stdout) == (3, b"")


def test_an_ascii_terminal_without_a_home_is_enough(on_disk):
    bare = {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0", "PYTHONIOENCODING": "ascii"}
    done = process("-C", on_disk, "log", "bert@main", env=bare)
    assert (done.returncode, done.stderr) == (0, b"")
    assert b"gr\\xf6\\xdfe" in done.stdout


def test_a_working_directory_that_was_deleted_is_said_to_be(tmp_path):
    gone = tmp_path / "gone"
    program = (
        f"import os, sys\nfrom lamella.cli import run\nos.mkdir({str(gone)!r}); os.chdir({str(gone)!r})\n"
        f"os.rmdir({str(gone)!r})\nsys.exit(run(['stats']))"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False)
    assert done.returncode == 3
    assert done.stderr.startswith("lamella: the working directory was deleted")
    assert done.stderr.count("\n") == 1
