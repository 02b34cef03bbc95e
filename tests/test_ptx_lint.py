"""The lint of publish/acquire protocols (ptx_lint.py): on what triton emits for a right kernel and for each mistake, a
small kernel and the single launch; and on written PTX for what control flow and the memory model allow."""

import json
from pathlib import Path

import pytest
from ptx_lint import lint
from test_compile_gate import run_compiling, versions

pytestmark = pytest.mark.cpu_only
TESTS = Path(__file__).parent

# name → (what is changed in the right kernel, rules that must find it, releases, acquires)
RIGHT = {"right": ({}, [], 1, 1)}
EITHER = {
    "no barrier": ({"BARRIER": False}, ["publish"], 1, 1),
    "relaxed release": ({"RELEASE": "relaxed"}, [], 0, 1),
    "relaxed acquire": ({"ACQUIRE": "relaxed"}, [], 1, 0),
    "scope of one program": ({"SCOPE": "cta"}, ["scope", "scope"], 1, 1),
    "poll in the K loop": ({"POLL_PER_STEP": True}, ["spinning"], 1, 1),
}
BY_TMA = {
    "no fence before the release": ({"FENCE_BEFORE_RELEASE": False}, ["proxy"], 1, 1),
    "no fence after the acquire": ({"FENCE_AFTER_ACQUIRE": False}, ["proxy"], 1, 1),
    "published by TMA": ({"STORE_BY_TMA": True}, ["tma store"], 1, 1),
    "pointers": ({"USE_TMA": False}, [], 1, 1),
}
# lint_mutants.py's, and how the problem that the gate has with each begins.
MUTANTS = {
    "right": [],
    "no barrier": ["publish"],
    "relaxed flag": ["synchronisation"],
    "flag for one program": ["scope"],
    "relaxed poll": ["synchronisation"],
    "poll for one program": ["scope"],
    "no wait": ["synchronisation"],
    "slice as it is": [],
    "slice counted relaxed": ["synchronisation"],
    "slice counted for one program": ["scope", "scope"],
}
MUTANTS_OF_TMA = {
    "no fence before publishing": ["proxy"],
    "no fence after waiting": ["proxy"],
    "stored by TMA": ["tma store"],
    "slice without a fence": ["proxy", "proxy"],
}
# triton 3.9 puts a barrier before a release, and waits until a TMA store is written.
MADE_RIGHT = {"no barrier", "published by TMA", "stored by TMA"}


def compile_elsewhere(script, argument, triton_folder) -> tuple[dict, set[str]]:
    """Return what a command prints, and which mistakes its triton makes right."""
    result = run_compiling(TESTS / script, argument, triton_folder=triton_folder)
    assert result.returncode == 0, result.stderr
    answer = json.loads(result.stdout)
    if triton_folder:
        assert answer["triton"] == "3.6.0"
    return answer, set() if answer["triton"].startswith(("3.6.", "3.7.")) else MADE_RIGHT


def rules(findings: list[str]) -> list[str]:
    return [text.split(":")[0] for text in findings]


@versions
@pytest.mark.parametrize("arch", ["sm_80", "sm_90"])
def test_every_mistake_is_found_in_what_triton_emits_and_nothing_else(arch, triton_folder):
    cases = RIGHT | EITHER | (BY_TMA if arch == "sm_90" else {})
    asked = json.dumps({name: (arch, changed) for name, (changed, *_) in cases.items()})
    answer, made_right = compile_elsewhere("ptx_lint_kernels.py", asked, triton_folder)
    found = {
        name: (rules(report["findings"]), report["releases"], report["acquires"])
        for name, report in answer["reports"].items()
    }
    assert found == {
        name: ([] if name in made_right else expected, releases, acquires)
        for name, (_, expected, releases, acquires) in cases.items()
    }
    right = answer["reports"]["right"]
    assert right["relaxed"] == 1  # the ticket
    if arch == "sm_80":
        assert min(right["stores"], right["reads"]) > 0
        assert not right["tma_loads"]
    else:  # x, hidden, weight, and y, each a descriptor of five parameters
        assert {name[-2:] for name in right["tma_loads"]} == {"_0", "_5", "10"}
        assert {name[-2:] for name in right["tma_stores"]} == {"15"}


@versions
@pytest.mark.parametrize("arch", ["sm_80", "sm_90"])
def test_the_gate_finds_every_mistake_in_one_launch(arch, triton_folder):
    answer, made_right = compile_elsewhere("lint_mutants.py", arch, triton_folder)
    expected = MUTANTS | (MUTANTS_OF_TMA if arch == "sm_90" else {})
    assert {name: rules(problems) for name, problems in answer["problems"].items()} == {
        name: [] if name in made_right else rule for name, rule in expected.items()
    }


STORE = "st.global.b32 [%rd1], %r1;"
LOAD = "ld.global.b32 %r3, [%rd1];"
BARRIER = "bar.sync 0;"
RELEASE = "@%p1 red.global.gpu.release.add.u32 [%rd2], %r1;"
ACQUIRE = "@%p1 ld.global.gpu.acquire.b32 %r2, [%rd2];"
RELAXED = "@%p1 atom.global.gpu.relaxed.add.u32 %r2, [%rd2], %r1;"
FENCE = "fence.acq_rel.gpu;"
PROXY_FENCE = "fence.proxy.async;"
MMA = "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%f1}, {%r1}, {%r2}, {%f1};"
HIDDEN, WEIGHT = ("mov.b64 %rd3, p_2; cvta.param.u64 %rd5, %rd3;", "mov.b64 %rd4, p_3; cvta.param.u64 %rd6, %rd4;")
ARRIVES = "global.mbarrier::complete_tx::bytes"
TMA_LOAD = f"@%p1 cp.async.bulk.tensor.2d.shared::cta.{ARRIVES} [%r4], [%rd5, {{%r1, %r1}}], [%r5];"
TMA_STORE = "@%p1 cp.async.bulk.tensor.2d.global.shared::cta.bulk_group [%rd5, {%r1, %r1}], [%r4];"
OTHER_TMA_LOAD = TMA_LOAD.replace("%rd5", "%rd6")
TABLE = "$T: .branchtargets $A, $B;"
WRITTEN = "cp.async.bulk.commit_group; cp.async.bulk.wait_group 0;"
CONSUMER = ACQUIRE + BARRIER + PROXY_FENCE + HIDDEN + TMA_LOAD


def wait_loop(body: str) -> str:
    """What triton's inline assembly looks like: the same label, time and again, in braces of its own."""
    return "{ .reg .pred complete; waitLoop: " + body + " @!complete bra.uni waitLoop; }"


def kernel(body: str) -> str:
    """Return the PTX of a kernel of 128 threads."""
    parameters = ".param .u64 .ptr .global .align 1 p_0,\n.param .u64 p_1,\n" + ",\n".join(
        f".param .align 64 .b8 p_{number}[128]" for number in (2, 3)
    )
    return f".version 8.7\n.target sm_90a\n.visible .entry k(\n{parameters}\n)\n.reqntid 128\n{{\n{body}\nret;\n}}\n"


CLEAN = {
    "nothing": "",
    "barrier": STORE + BARRIER + RELEASE,
    "store after the release": RELEASE + STORE,
    "a flag that is stored": f"$A: {BARRIER} st.global.gpu.release.b32 [%rd2], %r1; {RELEASE} @%p2 bra $A;",
    "shared store": "st.shared.b32 [%r4], %r1;" + RELEASE,
    "barrier on both branches": f"{STORE} @%p2 bra $A; {BARRIER} bra.uni $B; $A: {BARRIER} $B: {RELEASE}",
    "store on a branch that ends": f"@%p2 bra $A; {STORE} ret; $A: {RELEASE}",
    "store after the loop": f"$A: {RELEASE} @%p2 bra $A; {STORE}",
    "barrier in the loop": f"$A: {BARRIER} {RELEASE} {STORE} @%p2 bra $A;",
    "named barrier of all": f"{STORE} bar.sync 1, 128; {RELEASE}",
    "barrier with a vote": f"{STORE} bar.red.popc.u32 %r2, 0, %p1; {RELEASE}",
    "barrier of the cluster": f"{STORE} barrier.cluster.arrive.aligned; barrier.cluster.wait.aligned; {RELEASE}",
    "fence behind the barrier": STORE + BARRIER + FENCE + RELAXED,
    "relaxed, no fence": STORE + RELAXED,
    "indirect branch": f"{TABLE} {STORE} brx.idx %r1, $T; $A: {BARRIER} {RELEASE} ret; $B: {BARRIER}",
    "labels in braces": f"{STORE} {wait_loop('')} {BARRIER} {wait_loop(RELEASE)}",
    "comments": f"// {STORE}\n/* {STORE}\n */ {RELEASE}",
    "acquire": ACQUIRE + BARRIER + LOAD,
    "polling": f"$A: {BARRIER} {ACQUIRE} {BARRIER} @%p2 bra $A; {LOAD}",
    "relaxed read after the acquire": ACQUIRE + "ld.global.gpu.relaxed.b32 %r3, [%rd1];",
    "TMA": CONSUMER + STORE + PROXY_FENCE + BARRIER + RELEASE,
    "TMA load before the acquire": HIDDEN + TMA_LOAD + ACQUIRE + BARRIER + LOAD + STORE + BARRIER + RELEASE,
    "stored by TMA, never loaded": HIDDEN + WEIGHT + TMA_STORE + RELEASE + OTHER_TMA_LOAD,
    "TMA store that is written": HIDDEN + TMA_LOAD + TMA_STORE + WRITTEN + BARRIER + RELEASE,
    "system scope": STORE + BARRIER + RELEASE.replace("gpu", "sys"),
    "poll around the K loop": f"$A: {ACQUIRE} {BARRIER} $B: {MMA} @%p2 bra $B; @%p3 bra $A;",
}
MISTAKES = {
    "no barrier": ("publish", STORE + RELEASE),
    "release by a store": ("publish", STORE + "st.release.sys.global.u32 [%rd2], %r1;"),
    "generic store": ("publish", STORE.replace(".global", "") + RELEASE),
    "acquire and release at once": ("publish", STORE + RELEASE.replace("release", "acq_rel")),
    "barrier on one branch": ("publish", f"{STORE} @%p2 bra $A; {BARRIER} $A: {RELEASE}"),
    "store from the last iteration": ("publish", f"$A: {RELEASE} {STORE} @%p2 bra $A;"),
    "barrier that some threads skip": ("publish", f"{STORE} @%p2 {BARRIER} {RELEASE}"),
    "barrier of half the program": ("publish", f"{STORE} bar.sync 1, 64; {RELEASE}"),
    "arrival": ("publish", f"{STORE} bar.arrive 0, 128; {RELEASE}"),
    "barrier of a warp": ("publish", f"{STORE} bar.warp.sync -1; {RELEASE}"),
    "relaxed arrival": (
        "publish",
        f"{STORE} barrier.cluster.arrive.relaxed; barrier.cluster.wait; {RELEASE}",
    ),
    "store after the arrival": (
        "publish",
        f"barrier.cluster.arrive; {STORE} barrier.cluster.wait; {RELEASE}",
    ),
    "fence before the barrier": ("publish", STORE + FENCE + BARRIER + RELAXED),
    "indirect branch": ("publish", f"{TABLE} {STORE} brx.idx %r1, $T; $A: {BARRIER} $B: {RELEASE}"),
    "labels in braces": ("publish", f"{wait_loop(BARRIER)} {wait_loop(RELEASE + STORE)}"),
    "TMA store that is written, no barrier": ("publish", HIDDEN + TMA_LOAD + TMA_STORE + WRITTEN + RELEASE),
    "no barrier after the acquire": ("acquire", ACQUIRE + LOAD),
    "polling": ("acquire", f"$A: {BARRIER} {ACQUIRE} @%p2 bra $A; {LOAD}"),
    "asynchronous copy": ("acquire", ACQUIRE + "cp.async.cg.shared.global [ %r4 + 0 ], [ %rd1 + 0 ], 0x10, %r1;"),
    "no barrier before the TMA load": ("acquire", ACQUIRE + PROXY_FENCE + HIDDEN + TMA_LOAD),
    "no fence": ("proxy", ACQUIRE + BARRIER + HIDDEN + TMA_LOAD),
    "fence before the acquire": ("proxy", PROXY_FENCE + ACQUIRE + BARRIER + HIDDEN + TMA_LOAD),
    "fence for shared memory": ("proxy", CONSUMER.replace("proxy.async", "proxy.async.shared::cta")),
    "fence on one branch": ("proxy", f"{ACQUIRE} {BARRIER} @%p2 bra $A; {PROXY_FENCE} $A: {HIDDEN} {TMA_LOAD}"),
    "no fence before the release": ("proxy", CONSUMER + STORE + BARRIER + RELEASE),
    "TMA load by address": (
        "proxy",
        ACQUIRE + BARRIER + f"cp.async.bulk.shared::cta.{ARRIVES} [%r4], [%rd1], 64, [%r5];",
    ),
    "TMA store": ("tma store", HIDDEN + TMA_LOAD + TMA_STORE + BARRIER + RELEASE),
    "TMA store that is read": (
        "tma store",
        HIDDEN + TMA_LOAD + TMA_STORE + WRITTEN.replace("group 0", "group.read 0") + BARRIER + RELEASE,
    ),
    "all but one TMA store": (
        "tma store",
        HIDDEN + TMA_LOAD + TMA_STORE + WRITTEN.replace("group 0", "group 1") + BARRIER + RELEASE,
    ),
    "one of two descriptors": (
        "tma store",
        HIDDEN + WEIGHT + OTHER_TMA_LOAD + "@%p2 mov.b64 %rd5, %rd6;" + TMA_STORE + RELEASE,
    ),
    "some descriptor": ("tma store", WEIGHT + OTHER_TMA_LOAD + "ld.shared.b64 %rd5, [%r4];" + TMA_STORE + RELEASE),
    "scope of the cluster": ("scope", STORE + BARRIER + RELEASE.replace("gpu", "cluster")),
    "poll in the K loop": ("spinning", f"$A: {BARRIER} $B: {ACQUIRE} {BARRIER} @%p2 bra $B; {MMA} @%p3 bra $A;"),
}


@pytest.mark.parametrize("body", CLEAN.values(), ids=CLEAN.keys())
def test_what_is_right_has_no_findings(body):
    assert lint(kernel(body)).findings == []


@pytest.mark.parametrize(("rule", "body"), MISTAKES.values(), ids=MISTAKES.keys())
def test_what_is_wrong_has_one_finding(rule, body):
    (finding,) = lint(kernel(body)).findings
    assert finding.startswith(f"{rule}: "), finding


def test_findings_name_instructions_and_lines():
    report = lint(kernel(f"{STORE}\n{STORE}\n{RELEASE}\n{ACQUIRE}\n{LOAD}"))
    assert report.findings == [
        "publish: red.global.gpu.release.add.u32 (line 13) with no barrier since st.global.b32 (line 12) and 1 more",
        "acquire: ld.global.gpu.acquire.b32 (line 14) with no barrier before ld.global.b32 (line 15)",
    ]


def test_the_summary_counts():
    floats = "red.global.gpu.relaxed.add.f32 [%rd1], %f1; atom.global.gpu.acq_rel.add.noftz.bf16x2 %r1, [%rd1], %r2;"
    report = lint(kernel(CONSUMER + HIDDEN + TMA_STORE + LOAD + STORE + FENCE + RELAXED + RELAXED + floats))
    assert (report.releases, report.acquires, report.relaxed, report.float_atomics) == (4, 2, 3, 2)
    assert (report.stores, report.reads, report.tma_stores, report.tma_loads) == (1, 1, {"p_2": 1}, {"p_2": 1})


def test_functions_are_not_followed():
    function = f".func helper()\n{{\n{STORE}\nret;\n}}\n"
    assert rules(lint(function + kernel(RELEASE)).findings) == ["call"]
    assert not lint(".extern .func helper;\n" + kernel(RELEASE)).findings


@pytest.mark.parametrize(
    ("ptx", "message"),
    [
        ("", "expected one .entry, got 0"),
        (kernel("") + kernel(""), "expected one .entry, got 2"),
        (kernel("bra.uni $A;"), "line 11: no label \\$A"),
        (kernel("{ $A: " + BARRIER + " }\nbra.uni $A;"), "line 12: no label \\$A"),
    ],
)
def test_what_cannot_be_read_is_an_error(ptx, message):
    with pytest.raises(ValueError, match=message):
        lint(ptx)
