"""What is read off a compiled program's text: bytes to and from memory, loops, fast memory, collectives."""

from benchmarks import traffic

PROGRAM = """HloModule step

%sum (x: f32[], y: f32[]) -> f32[] {
  %x = f32[] parameter(0)
  %y = f32[] parameter(1)
  ROOT %add = f32[] add(%x, %y)
}

%body (state: (s32[], f32[10], f32[20])) -> (s32[], f32[10], f32[20]) {
  %state = (s32[]{:T(128)}, f32[10]{0}, f32[20]{0:T(128)S(1)}) parameter(0)
  %slow = f32[10]{0} get-tuple-element(%state), index=1
  %fast = f32[20]{0:T(128)S(1)} get-tuple-element(%state), index=2
  %twice = f32[10]{0} add(%slow, %slow)
  %kept = f32[20]{0:T(128)S(1)} multiply(%fast, %fast)
  ROOT %next = (s32[]{:T(128)}, f32[10]{0}, f32[20]{0:T(128)S(1)}) tuple(%state, %twice, %kept)
}

%condition (state: (s32[], f32[10], f32[20])) -> pred[] {
  %state = (s32[]{:T(128)}, f32[10]{0}, f32[20]{0:T(128)S(1)}) parameter(0)
  %limit = s32[]{:T(128)} constant(7)
  %place = s32[]{:T(128)} get-tuple-element(%state), index=0
  ROOT %less = pred[]{:T(512)} compare(%place, %limit), direction=LT, metadata={op_name="lt"}
}

ENTRY %main (a: bf16[100]) -> f32[5] {
  %a = bf16[100]{0} parameter(0)
  %copy-start = (bf16[100]{0:S(1)}, bf16[100]{0}, u32[]{:S(2)}) copy-start(%a)
  %copy-done = bf16[100]{0:S(1)} copy-done(%copy-start)
  %fusion = f32[5]{0} fusion(%copy-done), kind=kLoop, calls=%sum
  %all = f32[5]{0} all-reduce(%fusion), to_apply=%sum
  %loop = (s32[]{:T(128)}, f32[10]{0}, f32[20]{0:T(128)S(1)}) while(%all), condition=%condition, body=%body
  ROOT %out = f32[5]{0} copy(%all)
}
"""


def test_bytes_of_memory() -> None:
    copy, fusion, reduce, out = 200, 20, 40, 40
    assert traffic.memory_bytes(PROGRAM) == copy + fusion + reduce + out + 7 * (40 + 2 * 40)


def test_of_branches_the_largest_counts() -> None:
    several = "conditional(%a), branch_computations={%sum, %body}"
    two = "conditional(%a), true_computation=%body, false_computation=%sum"
    loop = "while(%all), condition=%condition, body=%body"
    for choice in (several, two):
        assert traffic.memory_bytes(PROGRAM.replace(loop, choice)) == 300 + 40 + 2 * 40


def test_bytes_of_collectives() -> None:
    assert traffic.sent_by_kind(PROGRAM) == {"all-reduce": 20}
    assert traffic.sent_bytes(PROGRAM.replace("= f32[5]{0} all-", "= (f32[5]{0}, s8[3]{0}) all-")) == 23


def test_kernels_and_collectives() -> None:
    assert traffic.kernels(PROGRAM) == 4 + 7 * 2
    assert traffic.collectives(PROGRAM) == 1


def test_a_loop_of_unknown_length_counts_once_or_as_often_as_said() -> None:
    once = PROGRAM.replace("direction=LT", "direction=NE")
    assert traffic.memory_bytes(PROGRAM) - traffic.memory_bytes(once) == 6 * 120
    assert traffic.memory_bytes(once, rounds=7) == traffic.memory_bytes(PROGRAM)
