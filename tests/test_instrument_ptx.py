"""PTX with its hooks.

Invariants: the text is only added to, and what was not edited keeps its bytes; every form of store, reduction, atomic and copy is marked,
or says why not; what writes no memory that others see is never marked; hooks stand before every way out; slots point at their digits; what
does not parse is ImageRefused with its line, and no bytes do anything else; what comes out assembles.
"""

from __future__ import annotations

import pathlib
import re
import time

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from concordia import abi, config
from concordia.checkpoint.handler import burst_source
from concordia.checkpoint.region import KvGeometry, Plane
from concordia.checkpoint.restore_burst import RESTORE_KERNEL
from concordia.device import neighbour
from concordia.device.compiler import HandlerSource
from concordia.device.cuda import CudaCompiler
from concordia.device.kernel_cache import KernelCache
from concordia.errors import ImageRefused
from concordia.instrument.ptx import PtxRewritten, read_text, rewrite_ptx
from concordia.instrument.ptx_tokens import Kind, number, tokens
from concordia.instrument.ptx_tree import Shape, parse
from concordia.instrument.report import Hook, KernelReport, Slot, SlotKind
from ptx_assembler import assemble
from ptx_forms import FILE, FORMS, GENERIC, KERNEL, MARK, NOTHING, RANGE, UNSEEN, WHOLE
from ptx_machine import filled, run

CORPUS = sorted((pathlib.Path(__file__).parent / "corpus" / "ptx").glob("*.ptx"))
GEOMETRY = KvGeometry(
    layers=16, block_count=64, block_tokens=16, block_bytes=65536, heads=8, head_dim_key=128, head_dim_value=128, element_bytes=2,
    key=Plane(0, 512, 4096, 2), value=Plane(256, 512, 4096, 2), dtype="bfloat16", instruction_set="any",
)  # fmt: skip


def rewrite(
    text: str, *, entry: bool = False, exit: bool = False, marks: bool = True
) -> PtxRewritten:
    return rewrite_ptx(text, entry=entry, exit=exit, marks=marks)


def only(done: PtxRewritten) -> KernelReport:
    (report,) = done.kernels
    return report


def without_ours(text: str, original: str) -> bool:
    """Whether the text is the original with pieces put in."""
    rest = iter(text)
    return all(character in rest for character in original)


def done_to(instruction: str, target: str = "sm_100") -> str:
    """What is done to a kernel with this instruction."""
    done = rewrite(
        FILE.format(target=target) + KERNEL.format(name="kernel", instruction=instruction)
    )
    report = only(done)
    if Hook.MARKS not in report.hooks:
        assert not done.slots
        return report.reason
    if Hook.WHOLE_REGION in report.hooks:
        return WHOLE
    stores = done.text.count("st.global.u8 [%cnc_to], %cnc_one;")
    kind = RANGE if "shr.s64" in done.text else MARK if stores else NOTHING
    assert (kind == NOTHING) == (not done.slots)
    if "isspacep.global" not in done.text:
        return kind
    return GENERIC if kind == MARK else f"{GENERIC} {kind}"


@pytest.mark.parametrize(
    ("instruction", "targets", "expected"), FORMS, ids=[form[0][:60] for form in FORMS]
)
def test_form_is_treated_by_its_rule_when_it_occurs(
    instruction: str, targets: tuple[str, ...], expected: str
) -> None:
    found = done_to(instruction, targets[0])
    assert found == expected or expected in found.partition("stores are not marked: ")[2]


@pytest.mark.parametrize(("instruction", "reason"), UNSEEN, ids=[form[0][:60] for form in UNSEEN])
def test_kernel_is_not_marked_and_says_why_when_a_store_cannot_be_followed(
    instruction: str, reason: str
) -> None:
    assert reason in done_to(f"st.global.u32 [%rd2], %r1; {instruction}")


@pytest.mark.parametrize("target", ["sm_80", "sm_90a", "sm_100", "sm_100a"])
def test_every_form_assembles_when_it_was_rewritten(target: str, tmp_path: pathlib.Path) -> None:
    forms = [
        instruction
        for instruction, targets, _ in FORMS
        if target in targets or (target == "sm_100a" and "sm_100" in targets)
    ]
    text = FILE.format(target=target) + "".join(
        KERNEL.format(name=f"kernel_{index}", instruction=form) for index, form in enumerate(forms)
    )
    assert assemble(text, target, tmp_path) == ""
    done = rewrite(text, entry=True, exit=True)
    assert len(done.kernels) == len(forms)
    assert without_ours(done.text, text)
    assert assemble(done.text, target, tmp_path) == ""


@pytest.mark.parametrize("path", CORPUS, ids=lambda path: path.stem)
def test_triton_kernel_assembles_when_it_was_rewritten(
    path: pathlib.Path, tmp_path: pathlib.Path
) -> None:
    text = path.read_text()
    target = parse(text).target[0]
    assert assemble(text, target, tmp_path) == ""
    done = rewrite(text, entry=True, exit=True)
    assert without_ours(done.text, text)
    assert assemble(done.text, target, tmp_path) == ""
    makes_maps = "tensormap.replace" in text
    assert only(done).hooks == Hook.ENTRY | Hook.EXIT | Hook.PTX | (
        Hook(0) if makes_maps else Hook.MARKS
    )
    assert ("tensor map" in only(done).reason) == makes_maps


@pytest.mark.parametrize("target", ["sm_80", "sm_90a", "sm_100"])
def test_own_kernels_assemble_when_they_were_rewritten(target: str, tmp_path: pathlib.Path) -> None:
    pytest.importorskip("cuda.bindings.nvrtc", reason="cuda-bindings are not installed")
    compiler = CudaCompiler(target, KernelCache(tmp_path / "cache"))
    shape = GEOMETRY.constants()
    sources = [
        *(
            HandlerSource.of(name, shape)
            for name in ("kv_append.cu", "kv_apply.cu", "kv_hash.cu", "kv_restore.cu")
        ),
        HandlerSource.of("page_scan.cu", {"PAGE_BYTES": 65536}),
        HandlerSource.of("bytes_append.cu"),
        burst_source(),
        neighbour.SOURCE,
        HandlerSource.of("executor.cu"),
    ]
    kernels = []
    for source in sources:
        text = compiler._ptx(source)[0].decode()
        done = rewrite(text, entry=True, exit=True)
        assert without_ours(done.text, text)
        assert assemble(done.text, target, tmp_path, relocatable=True) == "", source.file
        kernels += done.kernels
    print(*kernels, sep="\n")
    assert {"concordia_probe", "concordia_page_burst", RESTORE_KERNEL} <= {
        kernel.name for kernel in kernels if Hook.MARKS in kernel.hooks
    }


CUDA = r"""
extern "C" __device__ __noinline__ int deep(int n, int* p) { p[n] = n; return n < 2 ? 1 : deep(n - 1, p) + deep(n - 2, p + 1); }
struct Base { virtual __device__ void put(int* p) { *p = 1; } };
struct Derived : Base { __device__ void put(int* p) { *p = 2; } };
extern "C" __global__ void __launch_bounds__(256, 2) kernel(int* p, int n, float4* v) {
  extern __shared__ int dynamic[];
  __shared__ int fixed[32];
  switch (n) { case 0: p[1] = 3; break; case 1: p[2] = 4; break; case 2: p[9] = 1; case 3: p[11] = n; break; case 4: p[5] = deep(n, p); break; case 5: p[77] = 9; break; case 6: p[78] = 2; }
  for (int i = threadIdx.x; i < n; i += blockDim.x) {
    v[i] = make_float4(i, 1, 2, 3); dynamic[i & 31] = i; fixed[i & 31] = p[i];
    atomicAdd(&p[i & 7], i); atomicCAS((unsigned long long*)p, 1ull, 2ull);
  }
  volatile int* either = n & 1 ? fixed : p;
  *either = 5; __threadfence(); __syncthreads();
  asm volatile("{ .reg .pred %%p; setp.ne.b32 %%p, %0, 0;\n @%%p st.global.cs.u32 [%1], %0; }" ::"r"(n), "l"(p + 4) : "memory");
  printf("%d\n", fixed[n & 31]);
  if (n == 77) __trap();
  if (n == 78) return;
  Derived derived; Base* base = &derived;
  if (n > 5) base->put(p);
}
"""


@pytest.mark.parametrize("options", [["--device-debug"], ["--generate-line-info"], []], ids=["debug", "lines", "plain"])
@pytest.mark.parametrize("target", ["sm_80", "sm_90a", "sm_100", "sm_100f"])
def test_cuda_kernel_assembles_when_it_was_rewritten(target: str, options: list[str], tmp_path: pathlib.Path) -> None:
    """Switches, recursion, printf and inline assembly; a debugging build has virtual calls, too."""
    nvrtc = pytest.importorskip("cuda.bindings.nvrtc", reason="cuda-bindings are not installed")
    _, program = nvrtc.nvrtcCreateProgram(CUDA.encode(), b"kernel.cu", 0, [], [])
    words = [word.encode() for word in ("--std=c++17", f"--gpu-architecture={target.replace('sm', 'compute')}", *options)]
    assert [int(status) for status in nvrtc.nvrtcCompileProgram(program, len(words), words)] == [0]
    _, size = nvrtc.nvrtcGetPTXSize(program)
    image = bytearray(size)
    nvrtc.nvrtcGetPTX(program, image)
    text = read_text(bytes(image))
    is_debug = "--device-debug" in options
    assert assemble(text, target, tmp_path, debug=is_debug) == ""
    done = rewrite(text, entry=True, exit=True)
    assert without_ours(done.text, text)
    assert assemble(done.text, target, tmp_path, debug=is_debug) == ""
    assert ("stores are not marked: an indirect call" in only(done).reason) == is_debug
    assert (Hook.EXIT in only(done).hooks) != is_debug


def test_text_comes_back_byte_for_byte_when_nothing_is_asked_for() -> None:
    for path in CORPUS:
        text = path.read_text()
        done = rewrite(text, marks=False)
        assert done.text == text
        assert done.slots == ()
        assert only(done).hooks == Hook.PTX


def test_statements_cover_a_function_when_it_is_parsed() -> None:
    """What lies between two statements is white space, comments and stray semicolons."""
    for path in CORPUS:
        text = path.read_text()
        for function in filter(lambda f: f.has_body, parse(text).functions):
            assert text[function.head_end] == "{"
            assert text[function.end - 1] == "}"
            at = function.head_end
            for statement in function.statements:
                between = re.sub(r"//[^\n]*|/\*.*?\*/", "", text[at : statement.start], flags=re.DOTALL)
                assert between.strip(" \t\r\n;") == "", between
                assert statement.end > statement.start
                at = statement.end
            assert at == function.end


GRAMMAR = """// a comment before it
.version 8.7 .target sm_90a, texmode_independent, debug
.address_size 64 /* one; that has { in it */
.file 1 "a \\"quoted\\" /* name */.cu", 0, 17
.extern .func (.param .b32 out) vprintf (.param .b64 format, .param .b64 list);
.weak .global .align 8 .u64 pointers[2] = {table, generic(table) + 8}; .common .global .b32 shared_by_all;
.visible .const .align 4 .f32 factors[2] = {0f3F800000, 0F40000000};
.global .texref texture; .pragma "nounroll";
.alias other_name, helper;
.func (.reg .b32 %out) helper (.reg .b64 %to, .reg .b32 %value) .noreturn
{
	st.global.u32 [%to], %value; mov.u32 %out, 0;
	@%never exit;
	trap;
}
.visible .entry first (.param .align 64 .b8 first_0[128], .param .u64 .ptr .global .align 16 first_1)
.maxntid 128, 1, 1 .minnctapersm 2 .pragma "enable_smem_spilling"; .explicitcluster .reqnctapercluster 2
{
	.reg .pred %p<3>, never; .reg .b32 %r<10>, %r1a<5>; .reg .b64 %rd<4>; .local .align 8 .b8 __local_depot0[16];
	.loc 1 7 3, function_name $L__info0 + 12, inlined_at 1 9 1
	.branchtargets_of_nothing: mov.u32 %r1, 0x1F;
$L__tmp: @ ! %p1 bra.uni $L__end; mov.f32 %r2, 0f3F800000; mov.b32 %r3, -0x7; mov.b64 {%r4, _}, %rd1;
	{
		{ .reg .b64 %rd1; mov.u64 %rd1, 0; }
	}
table_of_targets: .branchtargets $L__tmp, $L__end;
	brx.idx %r1, table_of_targets;
prototype_0: .callprototype (.param .b32 _) _ (.param .b64 _, .param .b32 _);
functions_0: .calltargets helper, other_name;
	call (%r1), %rd1, (%rd2, %r3), functions_0;
$L__end: ret;
}
.section .debug_info
{
.b8 1, 2 // with { a comment
.b32 .debug_abbrev
.b64 $L__tmp-$L__end
}
"""


def test_grammar_is_understood_when_it_is_unusual() -> None:
    text = GRAMMAR.replace("	.branchtargets_of_nothing: mov", "	mov").replace("@%never exit", "@%p exit")
    module = parse(text)
    assert (module.version, module.target, module.address_bits) == ("8.7", ("sm_90a", "texmode_independent", "debug"), 64)
    assert [(f.name, f.is_entry, f.has_body) for f in module.functions] == [("vprintf", False, False), ("helper", False, True), ("first", True, True)]
    heads = [(s.head, s.guard) for s in module.functions[2].statements if s.shape is Shape.INSTRUCTION]
    assert ("bra.uni", "!%p1") in heads
    assert ("call", "") in heads
    done = rewrite(text, entry=True, exit=True)
    assert only(done).hooks == Hook.ENTRY | Hook.EXIT | Hook.MARKS | Hook.PTX, only(done)
    assert without_ours(done.text, text)


def test_numbers_are_read_when_they_have_a_base() -> None:
    spelled = {"0": 0, "17": 17, "0x1F": 31, "0X1fU": 31, "017": 15, "0b101": 5, "12U": 12, "0f3F800000": None, "1.5": None, "0d3FF0000000000000": None, "0xZ": None, "9" * 99: None}
    assert {text: number(text) for text in spelled} == spelled


def test_tokens_are_told_apart_when_they_touch() -> None:
    found = [(t.kind, t.text) for t in tokens('@!%p1 st.global.v2.f32 [%rd1+-4],{%f1,0f00000000};//x\n.loc 1"a\\"b"')]
    words = ["@", "!", "%p1", "st.global.v2.f32", "[", "%rd1", "+", "-", "4", "]", ",", "{", "%f1", ",", "0f00000000", "}", ";", ".loc", "1", '"a\\"b"', ""]
    assert [text for _, text in found] == words
    assert found[-1][0] is Kind.END


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("", "without .version"),
        (".version 8.0\n.target sm_90\n\x01", "line 3: no PTX"),
        (".version 8.0\n.target sm_90\n/* never ends", "line 3: a comment that does not end"),
        (".version 8.0\n.target sm_90\n.entry f() {\n ret\n", "line 5: it ends here"),
        (".version 8.0\n.target sm_90\n.entry f() {\n ret; ] }", "expected, found ']'"),
        (".version 8.0\n.target sm_90\n.entry f() {\n st [%r1, 3; }", "a bracket that was not opened"),
        (".version 8.0\n.target sm_90\n.entry f() {" + "{" * 100, "scopes in scopes"),
        (".version 8.0\n.target sm_90\n.entry f() { mov " + "(" * 100, "brackets in brackets"),
        (".version 8.0\n.target sm_90\n.entry (.param .b32 f) {}", "a function has a name"),
        (".version 8.0\n.target sm_90\n.address_size 128", "addresses of 32 or 64 bits"),
        (".version 8.0\n.target sm_90\n.entry f() {}\n.func f() {}", "two functions f"),
        (".version 8.0\n.target sm_90\nret;", "a directive expected"),
        ('.version 8.0\n.target sm_90\n.file 1 "a\nb"', "no PTX"),
        (".version 8.0\n.target sm_90\n.section .debug {{}}", "no braces in a section"),
        (".version 8.0\n.target sm_90\n.entry f() {\n.loc 1 2\nret; }", "a number expected"),
    ],
)  # fmt: skip
def test_text_is_refused_with_its_line_when_it_is_malformed(text: str, said: str) -> None:
    with pytest.raises(ImageRefused, match=re.escape(said)):
        rewrite(text)


def test_text_is_refused_when_it_is_too_long_or_no_text() -> None:
    with pytest.raises(ImageRefused, match="is the most"):
        rewrite(" " * (config.PTX_BYTES_MAX + 1))
    with pytest.raises(ImageRefused, match="PTX is text"):
        read_text(b".version \xff\xff")
    assert read_text(b".version 8.0\0 more") == ".version 8.0"


def test_kernel_stays_as_it_is_when_it_is_skipped_or_has_short_addresses() -> None:
    text = simple("st.global.u32 [%rd2], 1;", "a") + kernel("st.global.u32 [%rd2], 1;", "b")
    done = rewrite_ptx(text, entry=True, exit=True, marks=True, skip={"b": "denied by name"})
    assert [k.hooks for k in done.kernels] == [Hook.ENTRY | Hook.EXIT | Hook.MARKS | Hook.PTX, Hook.LEFT_ALONE | Hook.PTX]
    assert done.kernels[1].reason == "denied by name"
    assert done.text.endswith(kernel("st.global.u32 [%rd2], 1;", "b"))
    short = rewrite(text.replace(".address_size 64", ".address_size 32"), entry=True)
    assert {k.reason for k in short.kernels} == {"addresses of 32 bits"}
    assert short.slots == ()


def test_function_stays_as_it_is_when_a_kernel_of_it_does() -> None:
    function = ".func f(.reg .b64 p) { st.global.u32 [p], 1; exit; ret; }\n"
    deep = ".func deep(.reg .b64 p) { call f, (p); ret; }\n"
    pure = ".func pure(.reg .b64 p) { ret; }\n"
    kernels = [kernel(f"call {callee}, (%rd1);", name) for name, callee in (("a", "f"), ("b", "deep"), ("c", "pure"))]
    text = simple("", "d").replace(".visible", function + deep + pure + ".visible", 1) + "".join(kernels)
    done = rewrite_ptx(text, entry=True, exit=True, marks=True, skip={"a": "denied by name"})
    all_of_them = Hook.ENTRY | Hook.EXIT | Hook.MARKS | Hook.PTX
    assert {k.name: k.hooks for k in done.kernels} == {"d": all_of_them, "a": Hook.LEFT_ALONE | Hook.PTX, "b": Hook.ENTRY | Hook.PTX, "c": all_of_them}
    assert function in done.text
    assert kernels[0] in done.text
    both = kernel("call f, (%rd1); call g, (%rd1);", "both") + kernel("call g, (%rd1);", "other")
    chained = rewrite_ptx(text.replace(".visible", function.replace(" f(", " g(") + ".visible", 1) + both, entry=False, exit=True, marks=True, skip={"a": "denied by name"})
    found = {k.name: k.hooks for k in chained.kernels}
    assert (found["both"], found["other"]) == (Hook.PTX, Hook.MARKS | Hook.PTX)
    unseen = rewrite_ptx(text + kernel("call f, (%rd1); call unseen;", "e"), entry=True, exit=True, marks=True)
    found = {k.name: k.hooks for k in unseen.kernels}
    assert all(Hook.EXIT not in found[name] for name in "abe"), "their exits in f would be counted alone"
    assert [Hook.MARKS in found[name] for name in "abcde"] == [True, True, True, True, False]
    assert Hook.EXIT in found["c"]
    assert next(k.reason for k in unseen.kernels if k.name == "b").startswith("exits are not counted: a function of it")


def test_slots_are_the_digits_when_the_text_is_not_ascii() -> None:
    done = rewrite("// für Ähnliches\n" + simple("// größer\n st.global.u32 [%rd2], 1;"), entry=True, exit=True)
    image = done.text.encode()
    assert len(done.slots) == 3
    for slot in done.slots:
        assert slot == Slot(slot.offset, SlotKind.TEXT)
        assert image[slot.offset - 2 : slot.offset + 16] == b"0x" + b"0" * 16
    assert image.count(b"0x" + b"0" * 16) == 3


def test_names_of_ours_are_others_when_the_program_uses_them() -> None:
    text = simple(".reg .b64 %cnc_to, %cnc1_to; mov.u64 %cnc_to, 0; st.global.u32 [%rd2], 1;")
    done = rewrite(text, entry=True)
    assert "%cnc2_to" in done.text
    assert without_ours(done.text, text)


def test_rewriting_is_the_same_when_it_is_done_twice() -> None:
    for path in CORPUS:
        assert rewrite(path.read_text(), entry=True, exit=True) == rewrite(path.read_text(), entry=True, exit=True)


def test_values_are_passed_by_when_there_are_megabytes_of_them() -> None:
    values = "{" + ", ".join(["0x12, -7, other+8"] * 200_000) + "}"
    text = simple("st.global.u32 [late], 1;")
    for declared in (f".global .b8 early[9] = {values}, more[2] = {{{{1}}, {{2}}}}, last[] = {{/* }} */ 1}};\n.global .b32 late;\n", f".global .b32 early[9] = {values}, late;\n"):
        started = time.monotonic()
        module = parse(text.replace(".visible", declared + ".visible"))
        assert [found.head for found in module.directives[-1:]] == [".global"]
        done = rewrite(module.text)
        assert time.monotonic() - started < 2
        assert Hook.MARKS in only(done).hooks
        assert done.slots, "the name behind the values is known"
    with pytest.raises(ImageRefused):
        parse(text.replace(".visible", ".global .b8 early[9] = {1, 2 .visible"))


def test_time_grows_with_the_text_when_it_is_long() -> None:
    """Of shapes that invite a second look at what was seen before; a quadratic pass would take minutes."""
    count = 10_000
    texts = [
        simple("st.global.u32 [%rd2], 1; bar.sync 0;" * count),
        simple("$L: @%p1 bra $L; st.global.u32 [%rd2], 1;" * count),
        simple("st.global.u32 [%rd2], 1;" * count),
        simple("// " + "/*" * count + "\n" + "{ .reg .b32 %x<9>; }" * count),
        simple("") + "".join(f".func f{n}() {{ call f{n + 1}; }}\n" for n in range(count)) + "".join(kernel("call f0;", f"k{n}") for n in range(count // 10)),
    ]
    texts.append(simple(f"st.global.u32 [%rd2], 1; ld.global.u32 %r1, [%rd{'2' * 1_000_000}]; st.global.u32 [%rd{'2' * 1_000_000}], 1;"))
    for text in texts:
        started = time.monotonic()
        rewrite(text, entry=True, exit=True)
        assert time.monotonic() - started < 30


def kernel(instruction: str, name: str = "kernel") -> str:
    return f""".visible .entry {name}(.param .u64 {name}_0)
{{
	.reg .pred %p<4>; .reg .b32 %r<8>; .reg .b64 %rd<8>;
	ld.param.u64 %rd1, [{name}_0]; cvta.to.global.u64 %rd2, %rd1; mov.u32 %r1, %tid.x; setp.lt.u32 %p1, %r1, 7;
	mul.wide.u32 %rd3, %r1, 4; add.s64 %rd3, %rd3, %rd2;
	{instruction}
	ret;
}}
"""


def simple(instruction: str, name: str = "kernel") -> str:
    return f".version 8.0\n.target sm_80\n.address_size 64\n{kernel(instruction, name)}"


def marked(instruction: str, window: tuple[int, int] = (0, 1 << 20), before: str = "") -> tuple[set[int], int]:
    """Pages that are marked, and how many marks there are in the text."""
    text = simple(instruction).replace(".visible", before + ".visible", 1)
    done = rewrite(text)
    ran = run(filled(done), "kernel", buffer_bytes=1 << 20, threads=8, blocks=1, window=window)
    assert ran.data == run(text, "kernel", buffer_bytes=1 << 20, threads=8, blocks=1).data
    return set(ran.marked), done.text.count("st.global.u8 [%cnc_to], %cnc_one;")


def test_run_of_stores_is_one_mark_when_it_stays_in_a_page() -> None:
    """Stores of one run share the words; the marks in between are for other pages only."""
    assert marked("st.global.u32 [%rd3], 1; $L__tmp: st.global.u32 [%rd3+65536], 1; @%p1 st.global.u32 [%rd3+131072], 1;") == ({0, 1, 2}, 3)
    assert marked("st.global.u32 [%rd3], 1; bar.sync 0; st.global.u32 [%rd3+65536], 1;") == ({0, 1}, 2)
    assert marked("st.global.u32 [%rd3], 1; st.release.gpu.global.u32 [%rd3+65536], 1;") == ({0, 1}, 2)


def test_page_is_that_of_the_window_when_it_begins_anywhere() -> None:
    assert marked("st.global.u32 [%rd3+65536], 1;", window=(4096, 1 << 20))[0] == {0}
    assert marked("st.global.u32 [%rd3+65536], 1;", window=(65540, 1 << 20))[0] == {0}
    assert marked("st.global.u32 [%rd2+65536], 1;", window=(65540, 1 << 20))[0] == set()
    assert marked("st.global.u32 [%rd3+65536], 1;", window=(0, 65536))[0] == set()
    assert marked("st.global.u32 [%rd3+65536], 1;", window=(0, 0))[0] == set()


def test_page_is_marked_before_the_address_is_lost_when_an_atomic_overwrites_it() -> None:
    assert marked("atom.global.exch.b64 %rd2, [%rd2+131072], 5;")[0] == {2}


def test_function_is_marked_when_a_marked_kernel_gets_to_it() -> None:
    deep = ".func deep(.param .b64 deep_0) { .reg .b64 %rd1; ld.param.b64 %rd1, [deep_0]; st.u32 [%rd1+196608], 1; ret; }\n"
    call = "{ .param .b64 a; st.param.b64 [a], %rd3; call deep, (a); }"
    assert marked(call, before=deep) == ({3}, 1)
    unreached = rewrite(simple("").replace(".visible", deep + ".visible"))
    assert unreached.slots == ()
    hidden = rewrite(simple(call + " call unseen;").replace(".visible", deep + ".visible"))
    assert Hook.MARKS not in only(hidden).hooks
    assert hidden.slots == ()


def test_calls_are_followed_when_they_are_indirect_and_listed() -> None:
    deep = ".func deep(.param .b64 deep_0) { .reg .b64 %rd1; ld.param.b64 %rd1, [deep_0]; st.u32 [%rd1], 1; ret; }\n"
    call = "mov.u64 %rd4, deep; targets: .calltargets deep; { .param .b64 a; st.param.b64 [a], %rd3; call %rd4, (a), targets; }"
    assert Hook.MARKS in only(rewrite(simple(call).replace(".visible", deep + ".visible"))).hooks
    other = f"{{ {call} }} {{ targets: .callprototype _ (.param .b64 _); .param .b64 a; call %rd3, (a), targets; }}"
    for text in (other, call + other, call.replace("targets;", "later;") + " later: .calltargets deep;"):
        report = only(rewrite(simple(text).replace(".visible", deep + ".visible")))
        assert Hook.MARKS not in report.hooks
        assert "an indirect call" in report.reason
    asserting = "call __assertfail, (%rd1);"
    assert Hook.MARKS in only(rewrite(simple(asserting))).hooks


@pytest.mark.parametrize("leaving", ["@%p1 ret;", "@!%p1 exit;", "@%p1 bra $END; ret; $END: exit;", "{ ret; }", "bra $END; $END:"])
def test_block_counts_out_once_when_it_leaves_anywhere(leaving: str) -> None:
    done = rewrite(simple(leaving), entry=True, exit=True, marks=False)
    for text in (filled(done), filled(done).replace("\tret;\n}", "}")):
        ran = run(text, "kernel", buffer_bytes=64, threads=8, blocks=5)
        assert sum(ran.entries) == sum(ran.exits) == 5


def test_function_counts_out_before_it_exits_when_a_kernel_gets_to_it() -> None:
    leaving = ".func leaving() { .reg .pred %p1; @%p1 exit; @%p1 trap; ret; }\n"
    done = rewrite(simple("call leaving;").replace(".visible", leaving + ".visible"), exit=True, marks=False)
    function = done.text[done.text.index(".func") : done.text.index(".visible")]
    assert function.count("%cnc_first membar.gl") == 2


def test_words_are_read_once_when_registers_allow_it_and_runs_are_many() -> None:
    turns = "$L: st.global.u32 [%rd3], 1; @%p1 bra $L;"
    for limits, is_once in (("", True), (".maxntid 256", True), (".maxntid 1024", False), (".maxntid 128 .minnctapersm 8", False), (".maxnreg 64", False)):
        text = simple(turns + "st.global.u32 [%rd3], 2;").replace("_0)\n", f"_0) {limits}\n")
        assert len(rewrite(text).slots) == (1 if is_once else 2), limits
    assert len(rewrite(simple("setmaxnreg.dec.sync.aligned.u32 24;" + turns)).slots) == 1
    assert rewrite(simple(turns)).text.index("ld.global") < rewrite(simple(turns)).text.index("$L:")


def test_words_of_the_control_block_lie_as_the_loads_want_them() -> None:
    words = abi.CONTROL.offsets()
    assert words["window_bytes"] % 16 == 0
    assert words["map"] == words["window_bytes"] + 8
    assert words["map_stride"] % 8 == 0
    assert words["map_last"] == words["map_stride"] + 4
    assert abi.CONTROL_MAP_COPIES & (abi.CONTROL_MAP_COPIES - 1) == 0, "its last number is a mask"


@pytest.mark.parametrize("copies", [1, 4, 16])
def test_marks_go_to_the_copy_of_the_multiprocessor_when_the_map_has_several(copies: int) -> None:
    text = simple("st.global.u32 [%rd3+65536], 1;")
    for is_for_assembler in (False, True):
        done = rewrite_ptx(text, entry=False, exit=False, marks=True, is_for_assembler=is_for_assembler)
        shape = {"buffer_bytes": 1 << 20, "threads": 2, "blocks": 132, "window": (0, 1 << 20), "copies": copies}
        ran = run(filled(done), "kernel", **shape)
        assert ran.marked == {1}
        assert ran.copies == set(range(copies))


def attempt(image: bytes) -> None:
    """Returns, or raises ImageRefused, whatever the bytes are."""
    try:
        text = read_text(image)
        done = rewrite(text, entry=True, exit=True)
    except ImageRefused:
        return
    assert without_ours(done.text, text)
    for slot in done.slots:
        assert done.text.encode()[slot.offset : slot.offset + 16] == b"0" * 16


SEEDS = [GRAMMAR.encode(), simple("call (%r1), %rd4, (%rd1), p; cp.async.bulk.global.shared::cta.bulk_group [%rd2], [%r1], %r2;").encode(), *(path.read_bytes()[:6000] for path in CORPUS)]  # fmt: skip
PIECES = st.sampled_from([b"{", b"}", b"[", b"]", b"(", b")", b";", b",", b"@", b"!", b"%", b".", b'"', b"/*", b"*/", b"//", b"\n", b"=", b"<", b">", b"-", b"\0", b"\xff", b"\xc3\xa4",
                          b".entry", b".func", b".reg", b"call", b"st.global", b"atom", b"wmma.store", b"ret;", b".section", b".loc", b"%r<", b"9" * 5000, b"0x"])  # fmt: skip


@settings(max_examples=400, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(data=st.data())
def test_bytes_are_rewritten_or_refused_when_they_are_anything(data: st.DataObject) -> None:
    image = bytearray(data.draw(st.sampled_from(SEEDS)))
    for _ in range(data.draw(st.integers(1, 6))):
        at, end = sorted((data.draw(st.integers(0, len(image))), data.draw(st.integers(0, len(image)))))
        change = data.draw(st.sampled_from(["insert", "cut", "replace", "repeat"]))
        piece = data.draw(PIECES | st.binary(max_size=8))
        if change == "insert":
            image[at:at] = piece
        elif change == "cut":
            del image[at : min(end, at + 40)]
        elif change == "replace":
            image[at : at + len(piece)] = piece
        else:
            image[at:at] = image[at : min(end, at + 200)]
    attempt(bytes(image))
