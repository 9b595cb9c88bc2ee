"""Every form of an instruction that writes memory, and what the rewriter does to it.

Owns: the table, and the kernel around an instruction. Called by test_instrument_ptx.py, which assembles them, and by scenarios_ptx.py, which
runs those that one GPU can run.
"""

from __future__ import annotations

FILE = """.version 9.0
.target {target}
.address_size 64
.visible .global .align 16 .b8 table[64] = {{1, 2, 3, 0}}; .extern .shared .align 128 .b8 dynamic[];
"""
KERNEL = """.visible .entry {name}(.param .u64 .ptr .align 1 {name}_0)
{{
	.reg .pred %p<4>; .reg .b16 %h<8>; .reg .b32 %r<16>, %small; .reg .b64 %rd<16>; .reg .f32 %f<16>; .reg .f64 %fd<4>; .reg .b128 %q<4>;
	.shared .align 128 .b8 shared[1024];
	ld.param.u64 %rd1, [{name}_0]; cvta.to.global.u64 %rd2, %rd1;
	mov.u32 %r1, %tid.x; setp.eq.u32 %p1, %r1, 3; add.u32 %r1, %r1, 16909060; mov.u32 %r2, 16; mov.u32 %r5, shared; mov.u32 %r3, %r1; mov.u32 %r4, %r1;
	mov.b64 %rd3, 0; mov.b64 %rd4, 1; mov.b32 %f1, %r1; mov.b32 %f2, %r1; mov.b32 %f3, %r1; mov.b32 %f4, %r1; mov.b32 %f5, %r1; mov.b32 %f6, %r1;
	mov.b32 %f7, %r1; mov.b32 %f8, %r1; mov.b128 %q1, {{%rd1, %rd2}}; mov.u16 %h1, 1; mov.u16 %h2, 1; cvt.f64.f32 %fd1, %f1;
	createpolicy.fractional.L2::evict_first.b64 %rd9, 1.0;
	{instruction}
	ret;
}}
"""
ALL, HOPPER, BLACKWELL = ("sm_80", "sm_90a", "sm_100"), ("sm_90a", "sm_100"), ("sm_100",)
MARK, GENERIC, RANGE, GENERIC_RANGE, WHOLE, NOTHING = (
    "mark",
    "generic",
    "range",
    "generic range",
    "whole",
    "nothing",
)

# An instruction, the targets that have it, and what is done: anything else is the reason for which its kernel is not marked.
FORMS = [
    ("st.b32 [%rd1], %r1;", ALL, GENERIC),
    ("@%p1 st.global.u32 [%rd2+4], %r1;", ALL, MARK),
    ("@!%p1 st.global.u32 [ %rd2 + -4 ], %r1;", ALL, MARK),
    ("st.weak.global.u32 [%rd2], %r1;", ALL, MARK),
    ("st.relaxed.gpu.global.u32 [%rd2], %r1;", ALL, MARK),
    ("st.release.sys.global.u64 [%rd2], %rd3;", ALL, MARK),
    ("st.release.cluster.b32 [%rd1], %r1;", HOPPER, GENERIC),
    ("st.volatile.global.u32 [%rd2], %r1;", ALL, MARK),
    ("st.volatile.u32 [%rd1], %r1;", ALL, GENERIC),
    ("st.mmio.relaxed.sys.global.u32 [%rd2], %r1;", ALL, MARK),
    ("st.global.cs.u32 [%rd2], %r1;", ALL, MARK),
    ("st.global.wt.v2.f32 [%rd2], {%f1, %f2};", ALL, MARK),
    ("st.global.L1::evict_last.u32 [%rd2], %r1;", ALL, MARK),
    ("st.global.L1::no_allocate.L2::cache_hint.v4.f32 [%rd2], {%f1, %f2, %f3, %f4}, %rd9;", ALL, MARK),
    ("st.global.L2::cache_hint.u32 [%rd2], %r1, %rd9;", ALL, MARK),
    ("st.global.v8.b32 [%rd2], {%f1,%f2,%f3,%f4,%f5,%f6,%f7,%f8};", BLACKWELL, MARK),
    ("st.global.v4.b64 [%rd2], {%rd1,%rd2,%rd3,%rd4};", BLACKWELL, MARK),
    ("st.global.b128 [%rd2], %q1;", ALL, MARK),
    ("st.global.u8 [%rd2+7], %r1;", ALL, MARK),
    ("st.global.f64 [table], %fd1;", ALL, MARK),
    ("st.global.u32 [table+8], %r1;", ALL, MARK),
    ("st.shared.u32 [shared+4], %r1;", ALL, NOTHING),
    ("st.shared.v2.u32 [%r5], {%r1,%r2};", ALL, NOTHING),
    ("st.shared::cluster.u32 [%r5], %r1;", HOPPER, NOTHING),
    ("st.local.u32 [%rd1], %r1;", ALL, NOTHING),
    ("st.bulk.weak.shared::cta [%r5], %rd3, 0;", BLACKWELL, NOTHING),
    ("st.bulk.weak [%rd1], %rd3, 0;", BLACKWELL, NOTHING),
    ("red.global.add.u32 [%rd2], %r1;", ALL, MARK),
    ("red.add.f32 [%rd1], %f1;", ALL, GENERIC),
    ("red.relaxed.gpu.global.add.noftz.f16 [%rd2], %h1;", ALL, MARK),
    ("red.global.add.noftz.bf16x2 [%rd2], %r1;", HOPPER, MARK),
    ("red.global.v4.f32.add [%rd2], {%f1,%f2,%f3,%f4};", HOPPER, MARK),
    ("red.global.add.noftz.v4.f16 [%rd2], {%h1,%h2,%h1,%h2};", HOPPER, MARK),
    ("red.global.add.L2::cache_hint.u32 [%rd2], %r1, %rd9;", ALL, MARK),
    ("red.shared.add.u32 [shared], %r1;", ALL, NOTHING),
    ("atom.global.add.u32 %r3, [%rd2], %r1;", ALL, MARK),
    ("atom.add.u64 %rd3, [%rd1], %rd4;", ALL, GENERIC),
    ("atom.global.exch.b64 %rd2, [%rd2], %rd4;", ALL, MARK),
    ("@%p1 atom.exch.b64 %rd1, [%rd1+8], %rd4;", ALL, GENERIC),
    ("atom.acq_rel.gpu.global.cas.b32 %r3, [%rd2], %r1, %r4;", ALL, MARK),
    ("atom.global.cas.b128 %q2, [%rd2], %q1, %q1;", HOPPER, MARK),
    ("atom.global.v2.f32.add {%f1,%f2}, [%rd2], {%f3,%f4};", HOPPER, MARK),
    ("atom.global.add.noftz.f16x2 %r3, [%rd2], %r1;", ALL, MARK),
    ("atom.global.cas.b16 %h1, [%rd2], %h1, %h2;", ALL, MARK),
    ("atom.global.inc.u32 _, [%rd2], %r1;", ALL, MARK),
    ("atom.shared.add.u32 %r3, [shared], %r1;", ALL, NOTHING),
    ("st.async.weak.shared::cluster.mbarrier::complete_tx::bytes.b32 [%r5], %r1, [%r5];", HOPPER, NOTHING),
    ("st.async.mmio.release.sys.global.b32 [%rd2], %r1;", BLACKWELL, MARK),
    ("st.async.release.gpu.b32 [%rd1], %r1;", BLACKWELL, GENERIC),
    ("red.async.relaxed.cluster.shared::cluster.mbarrier::complete_tx::bytes.add.u32 [%r5], %r1, [%r5];", HOPPER, NOTHING),
    ("red.async.mmio.release.gpu.global.add.u32 [%rd2], %r1;", BLACKWELL, MARK),
    ("cp.async.bulk.global.shared::cta.bulk_group [%rd2], [%r5], %r2;", HOPPER, RANGE),
    ("@%p1 cp.async.bulk.global.shared::cta.bulk_group [%rd2+16], [%r5], 512;", HOPPER, RANGE),
    ("cp.async.bulk.global.shared::cta.bulk_group.L2::cache_hint [%rd2], [shared], %r2, %rd9;", HOPPER, RANGE),
    ("cp.async.bulk.global.shared::cta.bulk_group.L2::cache_hint.cp_mask [%rd2], [shared], 16, %rd9, %h1;", BLACKWELL, RANGE),
    ("cp.reduce.async.bulk.global.shared::cta.bulk_group.add.u32 [%rd2], [%r5], %r2;", HOPPER, RANGE),
    ("cp.reduce.async.bulk.shared::cluster.shared::cta.mbarrier::complete_tx::bytes.add.u32 [%r5], [%r5], %r2, [%r5];", HOPPER, NOTHING),
    ("cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes [%r5], [%rd2], %r2, [%r5];", HOPPER, NOTHING),
    ("cp.async.bulk.prefetch.L2.global [%rd2], %r2;", HOPPER, NOTHING),
    ("cp.async.bulk.tensor.2d.global.shared::cta.bulk_group [%rd2, {%r1, %r3}], [%r5];", HOPPER, WHOLE),
    ("cp.async.bulk.tensor.1d.shared::cluster.global.mbarrier::complete_tx::bytes [%r5], [%rd2, {%r1}], [%r5];", HOPPER, NOTHING),
    ("cp.reduce.async.bulk.tensor.2d.global.shared::cta.add.bulk_group [%rd2, {%r1, %r3}], [%r5];", HOPPER, WHOLE),
    ("cp.async.bulk.prefetch.tensor.1d.L2.global [%rd2, {%r1}];", HOPPER, NOTHING),
    ("cp.async.bulk.commit_group; cp.async.bulk.wait_group.read 0;", HOPPER, NOTHING),
    ("cp.async.ca.shared.global [%r5], [%rd2], 16;", ALL, NOTHING),
    ("multimem.st.global.f32 [%rd2], %f1;", HOPPER, WHOLE),
    ("multimem.red.global.add.f32 [%rd2], %f1;", HOPPER, WHOLE),
    ("multimem.ld_reduce.global.add.f32 %f1, [%rd2];", HOPPER, NOTHING),
    ("tensormap.replace.tile.global_address.global.b1024.b64 [%rd2], %rd3;", ("sm_90a", "sm_100a"), "a tensor map that the device makes"),
    ("tensormap.replace.tile.rank.shared::cta.b1024.b32 [%r5], 1;", ("sm_90a", "sm_100a"), "a tensor map that the device makes"),
    ("fence.proxy.tensormap::generic.acquire.gpu [%rd2], 128;", HOPPER, "a tensor map that the device makes"),
    ("fence.proxy.tensormap::generic.release.gpu;", HOPPER, NOTHING),
    ("tensormap.cp_fenceproxy.global.shared::cta.tensormap::generic.release.gpu.sync.aligned [%rd2], [%r5], 128;", HOPPER, "a tensor map that the device makes"),
    ("discard.global.L2 [%rd2], 128;", ALL, MARK),
    ("discard.L2 [%rd1], 128;", ALL, GENERIC),
    ("applypriority.global.L2::evict_normal [%rd2], 128; prefetch.global.L2 [%rd2];", ALL, NOTHING),
    ("wmma.store.d.sync.aligned.row.m16n16k16.global.f32 [%rd2], {%f1,%f2,%f3,%f4,%f5,%f6,%f7,%f8}, %r2;", ALL, RANGE),
    ("wmma.store.d.sync.aligned.col.m16n16k16.f16 [%rd1], {%r1,%r2,%r3,%r4};", ALL, GENERIC_RANGE),
    ("wmma.store.d.sync.aligned.row.m16n16k16.shared.f16 [%r5], {%r1,%r2,%r3,%r4}, 32;", ALL, NOTHING),
    ("stmatrix.sync.aligned.m8n8.x1.shared.b16 [%r5], {%r1};", HOPPER, NOTHING),
    ("{ .reg .b64 %rd1; mov.u64 %rd1, table; st.global.u32 [%rd1], 5; } st.global.u32 [%rd2], 6;", ALL, MARK),
    ("/* st.global.u32 [%rd2], 1; */ // st.global.u32 [%rd2], 2;", ALL, NOTHING),
]  # fmt: skip

# What no target takes, or takes only with more around it: rewritten, not assembled.
UNSEEN = [
    ("sust.b.1d.b32.trap [surface, {%r1}], {%r2};", "a surface"),
    ("sured.b.add.1d.u32.trap [surface, {%r1}], %r2;", "a surface"),
    ("hyperstore.global.u32 [%rd2], %r1;", "hyperstore is no instruction that is known"),
    ("st.global.u32 [nobody], %r1;", "nobody is no register and no global variable"),
    ("st.u32 [shared], %r1;", "shared is no register and no global variable"),
    ("st.global.u32 [%h1], %r1;", "an address of 16 bits"),
    ("st.global.u32 [%rd1+%r2], %r1;", "its address is not understood"),
    (
        "cp.async.bulk.global.shared::cta.bulk_group [%rd2], [%r5], %nobody;",
        "its size is not understood",
    ),
    (
        "cp.async.bulk.somewhere.shared::cta.bulk_group [%rd2], [%r5], 16;",
        "a copy that is not known",
    ),
    (
        "wmma.store.d.sync.aligned.row.m64n64k64.global.f32 [%rd2], {%f1}, %r2;",
        "a matrix that is not known",
    ),
    ("call unseen, (%rd1);", "a call of unseen, whose code is not here"),
    ("call (%r1), %rd3, (%rd1), prototype;", "an indirect call"),
]
