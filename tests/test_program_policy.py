"""integrations/program/policy.py.

Invariants: what is written comes out, and what is left out is the default; every mistake is one line that names the file, the line and the key,
and says what to write; nothing that was read makes a line of the shim's that reads as another one.
"""

from __future__ import annotations

import itertools
import os
import random
import re
import tomllib
from fnmatch import fnmatchcase
from pathlib import Path

import pytest

from concordia import config
from concordia.errors import UsageError
from concordia.integrations.program.policy import (
    EVERY,
    Policy,
    RegionRule,
    Trigger,
    parse_policy,
    read_policy,
)
from concordia.integrations.program.policy_table import may_share

GOOD = """[program]
series = "lora"
warm_points = 2
[journal]
place = "/dev/shm/somewhere"
size = "64MiB"
[limits]
stage = "1GiB"
[[region]]
name = "segments"
size = ["1MiB", "64MiB"]
[[region]]
name = "first"
size = "20MiB"
ordinal = 0
[[region]]
name = "kv"
kernel = "*reshape_and_cache*"
argument = 3
bytes = 4096
[[region]]
name = "workspace"
stack = "libcublas*"
[[trigger]]
on = "kernel:*adam*:every=2"
interval_ms = 5
[[trigger]]
on = "graph-launch"
[images]
exit_hooks = true
opaque = ["cublas*"]
trust_arguments = ["libtorch*"]
trust_maps = ["*gemm*"]
"""


def test_policy_says_what_was_written_when_it_is_right() -> None:
    policy = parse_policy(GOOD, "p.toml")
    assert parse_policy(GOOD.replace("warm_points = 2", "keep_addresses = true"), "p.toml").keep_addresses
    assert (policy.keep_addresses, policy.series, policy.warm_points, policy.journal, policy.journal_bytes) == (False, "lora", 2, Path("/dev/shm/somewhere"), 64 << 20)
    assert policy.stage_bytes == 1 << 30
    assert policy.reads_bytes == config.PROGRAM_READS_BYTES
    assert policy.regions == (
        RegionRule("segments", 1 << 20, 64 << 20),
        RegionRule("first", 20 << 20, 20 << 20, 0),
        RegionRule("kv", kernel="*reshape_and_cache*", argument=3, bytes=4096),
        RegionRule("workspace", stack="libcublas*"),
    )
    assert policy.triggers == (Trigger("kernel", "*adam*", 2, 5000), Trigger("graph-launch"))
    assert policy.hooks == {"entry": True, "exit": True, "marks": True}
    assert (policy.opaque, policy.deny, policy.trust_arguments) == (("cublas*",), (), ("libtorch*",))
    assert policy.trust_maps == ("*gemm*",)
    lines = policy.lines().splitlines()
    assert [line for line in lines if line.startswith(("trust ", "maps "))] == ["trust libtorch*", "maps *gemm*"]
    assert lines[0] == "concordia-policy 1"
    assert f"region segments {1 << 20} {64 << 20} {EVERY} 0 0 - -" in lines
    assert f"region kv 1 {1 << 62} {EVERY} 3 4096 - *reshape_and_cache*" in lines
    assert "trigger kernel 2 5000 *adam*" in lines


def test_policy_protects_nothing_when_it_is_empty() -> None:
    policy = parse_policy("", "p.toml")
    assert policy == Policy(hooks={"entry": True, "exit": False, "marks": True})
    assert not policy.protects


@pytest.mark.parametrize(
    ("found", "wrong", "words"),
    [
        ('"64MiB"\n[limits]', '"64Mb"\n[limits]', r"p.toml:6: journal.size: '64Mb': want a size such as 2MiB"),
        ('"20MiB"', '["3MiB", "2MiB"]', r"p.toml:14: region\[1\].size: .* the smallest and the largest"),
        ("argument = 3", "argument = -1", r"p.toml:19: region\[2\].argument: -1: want a whole number from 0 to 255"),
        ('"kv"', '"first"', r"p.toml:17: region\[2\].name: first is there already"),
        ('"kv"', '"a b"', r"p.toml:17: region\[2\].name: 'a b': want 1 to 32 letters"),
        ('stack = "libcublas*"', "", r"p.toml:21: region\[3\].size: say which allocation: size, stack or kernel"),
        ('"libcublas*"', '"a\\nregion x"', r"p.toml:23: region\[3\].stack: .* no blanks"),
        ("ordinal = 0", "argument = 0", r"p.toml:15: region\[1\].argument: belongs to a kernel"),
        ("ordinal = 0", 'kernel = "k"\nordinal = 0', r"p.toml:15: region\[1\].kernel: .* no stack, ordinal"),
        ("ordinal = 0", "ordinals = 0", r"p.toml:15: region\[1\].ordinals: no such key; known are argument, bytes"),
        ('"graph-launch"', '"graph"', r"p.toml:28: trigger\[1\].on: 'graph': write graph-launch"),
        ("every=2", "every=two", r"p.toml:25: trigger\[0\].on: .* write kernel:NAME:every=4"),
        ("interval_ms = 5", 'interval_ms = "5"', r"p.toml:26: trigger\[0\].interval_ms: '5': want a whole number"),
        ("exit_hooks = true", "exit_hooks = 1", r"p.toml:30: images.exit_hooks: 1: want true or false"),
        ('["*gemm*"]', '["*gemm*", "gemm_?"]', r"p.toml:33: images.trust_maps: 'gemm_\?': name such a kernel in trust_arguments, too"),
        ('trust_arguments = ["libtorch*"]', "", r"p.toml:33: images.trust_maps: '\*gemm\*': name such a kernel in trust_arguments, too"),
        ('["cublas*"]', '"cublas*"', r"p.toml:31: images.opaque: want a list"),
        ('"/dev/shm/somewhere"', '"somewhere"', r"p.toml:5: journal.place: 'somewhere': want an absolute path"),
        ("[journal]\nplace", "[journals]\nplace", r"p.toml:4: journals: no such key; known are images"),
        ("[[region]]\nname = \"segments\"", "[region]\nname = \"segments\"", r"p.toml: .*line 12"),
    ],
)
def test_policy_is_refused_in_one_line_when_something_is_wrong(found: str, wrong: str, words: str) -> None:
    assert found in GOOD
    with pytest.raises(UsageError, match=words) as refused:
        parse_policy(GOOD.replace(found, wrong), "p.toml")
    assert "\n" not in str(refused.value)
    assert refused.value.exit_code == 2


def test_policy_is_refused_when_half_of_it_is_missing() -> None:
    region, trigger = '[[region]]\nname = "a"\nsize = 1\n', '[[trigger]]\non = "graph-launch"\n'
    for text, words in ((region, "add a .*trigger"), (trigger, "add a .*region"), (region + trigger, "say where it lies"), ("journal = 1", "want a table")):
        with pytest.raises(UsageError, match=words):
            parse_policy(text, "p.toml")
    many = "".join(f'[[region]]\nname = "r{i}"\nsize = 1\n' for i in range(config.PROGRAM_RULES_MAX + 1))
    with pytest.raises(UsageError, match="at most"):
        parse_policy(many + trigger, "p.toml")


def test_file_is_refused_when_it_cannot_be_read(tmp_path: Path) -> None:
    path = tmp_path / "p.toml"
    with pytest.raises(UsageError, match="give a policy file"):
        read_policy(path)
    path.write_bytes(b"\xff")
    with pytest.raises(UsageError, match="not UTF-8 at byte 0"):
        read_policy(path)
    path.write_bytes(b"#" * (config.POLICY_BYTES_MAX + 1))
    with pytest.raises(UsageError, match="is no policy"):
        read_policy(path)
    path.write_text(GOOD, encoding="utf-8")
    assert read_policy(path) == parse_policy(GOOD, "")


def test_text_is_a_policy_or_a_one_line_error_when_it_was_damaged() -> None:
    seed = random.randrange(1 << 30)
    print(f"seed {seed}")
    rng = random.Random(seed)
    said: list[str] = []
    for _ in range(2000):
        text = list(GOOD)
        for _ in range(rng.randint(1, 4)):
            at = rng.randrange(len(text))
            text[at : at + rng.randint(0, 3)] = rng.choices('[]"=\n .*9aZ-_{}', k=rng.randint(0, 3))
        try:
            policy = parse_policy("".join(text), "p.toml")
        except UsageError as error:
            said.append(str(error))
            continue
        words = {"concordia-policy", "warm", "audit", "addresses", "stage", "reads", "region", "trigger", "trust", "maps"}
        assert {line.split()[0] for line in policy.lines().splitlines()} <= words
        assert not re.search(r"[^\S\n ]", policy.lines())
        assert tomllib.loads("".join(text)) is not None
    assert all("\n" not in text and text.startswith("p.toml") for text in said)
    assert len(said) > 1000


def test_patterns_share_a_name_when_one_is_found_that_matches_both() -> None:
    seed = int(os.environ.get("POLICY_SEED", random.randrange(1 << 30)))
    print(f"POLICY_SEED={seed}")
    rng = random.Random(seed)
    names = ["".join(found) for size in range(7) for found in itertools.product("ab", repeat=size)]
    shared = 0  # of patterns of four at most a shared name has six letters at most: "aaa*" and "*bbb"
    for _ in range(2000):
        one, other = ("".join(rng.choices("ab?*", (3, 3, 1, 1), k=rng.randrange(1, 5))) for _ in range(2))
        found = any(fnmatchcase(name, one) and fnmatchcase(name, other) for name in names)
        assert may_share(one, other) == may_share(other, one) == found, (one, other)
        shared += found
    assert 0 < shared < 2000
    assert may_share("ab[cd]", "abz*")
    assert not may_share("ab[cd]", "b*")
