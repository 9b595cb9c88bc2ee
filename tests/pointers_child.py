"""A program that asks the driver about its memory, for test_shim_pointers.py and test_gpu_program.py: pointers_child.py MODE; prints one line of JSON.

tell: what the driver says of each of some allocations, and of one that is freed. The others want the fake driver: churn: memory that a small one,
allocated and freed again and again, took. hole: a granule between two others is wanted. full: a small one is wanted where there is room for no granule.
spare: what is mapped and empty is wanted. capture STREAM END: memory is freed beside a capture. behind: memory is freed in the order of a stream. gone: the
context ends before the memory. bounds: many of a size. resolver: whether the driver's own functions are given for their names.
"""

import ctypes
import itertools
import json
import os
import sys
from typing import Any

CUDA = ctypes.CDLL("libcuda.so.1")
SIZES = (1, 100, 512, 1000, (1 << 20) - 1, 1 << 20, (2 << 20) + 5, 7 << 20, 3)
MIB = 1 << 20
CONTEXT, BUFFER_ID, IS_IPC_CAPABLE, RANGE_START, RANGE_SIZE = 1, 7, 10, 11, 12
NAMES = {"cuMemGetAddressRange": "cuMemGetAddressRange_v2", "cuPointerGetAttribute": "", "cuPointerGetAttributes": ""}


def do(name: str, *arguments: Any) -> None:
    result = getattr(CUDA, name)(*arguments)
    assert result == 0, f"{name}: {result}"


def allocate(size: int) -> int:
    found = ctypes.c_uint64()
    do("cuMemAlloc_v2", ctypes.byref(found), ctypes.c_size_t(size))
    return found.value


def free(address: int) -> None:
    do("cuMemFree_v2", ctypes.c_uint64(address))


def address_range(address: int) -> tuple[int, int, int]:
    start, size = ctypes.c_uint64(), ctypes.c_size_t()
    return CUDA.cuMemGetAddressRange_v2(ctypes.byref(start), ctypes.byref(size), ctypes.c_uint64(address)), start.value, size.value


def attribute(number: int, address: int) -> int:
    value = ctypes.c_uint64()
    do("cuPointerGetAttribute", ctypes.byref(value), number, ctypes.c_uint64(address))
    return value.value


def attributes(address: int, *numbers: int) -> list[int]:
    values = [ctypes.c_uint64() for _ in numbers]
    places = (ctypes.c_void_p * len(values))(*(ctypes.addressof(value) for value in values))
    do("cuPointerGetAttributes", len(values), (ctypes.c_int * len(values))(*numbers), places, ctypes.c_uint64(address))
    return [value.value for value in values]


def tell(context: int) -> dict[str, Any]:
    places = [allocate(size) for size in SIZES]
    rows, ids = [], set()
    for place, size in zip(places, SIZES, strict=True):
        for at in {place, place + size // 2, place + size - 1}:
            result, start, length = address_range(at)
            assert result == 0
            singly = [attribute(number, at) for number in (CONTEXT, BUFFER_ID, RANGE_START, RANGE_SIZE)]
            at_once = attributes(at, RANGE_SIZE, RANGE_START, BUFFER_ID, CONTEXT)
            assert at_once == singly[::-1], (at_once, singly)
            ids.add(singly[1])
            rows.append([size, start - place, length, singly[0] == context, singly[2] - place, singly[3]])
    ipc = [CUDA.cuIpcGetMemHandle(ctypes.create_string_buffer(64), ctypes.c_uint64(place)) == 0 for place in places]
    capable = [bool(attribute(IS_IPC_CAPABLE, place)) for place in places]
    gone = places[3]
    free(gone)  # its neighbours stay
    value = ctypes.c_uint64()
    of_freed = [address_range(gone)[0] == 0, CUDA.cuPointerGetAttribute(ctypes.byref(value), RANGE_SIZE, ctypes.c_uint64(gone)) == 0, attributes(gone, 2)]
    for place in places:
        if place != gone:
            free(place)
    return {"rows": sorted(rows), "ids": len(ids), "ipc": ipc, "capable": capable, "freed": of_freed}


def live() -> int:
    CUDA.fake_live.restype = ctypes.c_uint64
    return int(CUDA.fake_live())


def leave(size: int) -> None:
    CUDA.fake_leave(ctypes.c_uint64(size))


def churn(_: int) -> dict[str, Any]:
    free(allocate(512))
    made, places = CUDA.fake_created(), set()
    for turn in range(200):
        place = allocate(1 + turn)
        places.add(place)
        free(place)
    # two granules, of which the upper is emptied first, and then last
    pairs = [allocate(MIB - 512) for _ in range(4)]
    before = live()
    for order in (pairs[::-1], pairs):
        for place in order:
            free(place)
        left = live()
        pairs = [allocate(MIB - 512) for _ in range(4)]
    for place in pairs:
        free(place)
    places.add(allocate(1))  # in the lower one, which is the one that stayed
    return {"made": CUDA.fake_created() - made, "places": len(places), "given_back": before - left, "same": pairs == sorted(pairs) and pairs[0] in places}


def hole(_: int) -> dict[str, Any]:
    places = [allocate(MIB - 512) for _ in range(6)]  # of three granules
    for place in (*places[2:4], *places[:2]):
        free(place)
    again = [allocate(MIB - 512)]
    for place in places[4:]:
        free(place)
    leave(MIB)  # enough for the driver; now the third is empty and mapped, and the second, which comes before, is not
    again += [allocate(MIB - 512) for _ in range(3)]
    return {"same": again == places[:4]}


def full(_: int) -> dict[str, Any]:
    region, first = allocate(2 * MIB), allocate(MIB)
    small = [allocate(MIB - 1), allocate(MIB - 1)]
    leave(MIB)
    small.append(allocate(600 * 1024))
    return {"kept": [abs(place - region) < 2 << 30 for place in (first, *small)]}


def spare(_: int) -> dict[str, Any]:
    free(allocate(100))
    found, before = ctypes.c_uint64(), live()
    leave(0)
    large = allocate(3 * MIB // 2)  # of the same memory, and no region
    free(large)
    free(allocate(100))
    leave(0)
    do("cuMemAllocAsync", ctypes.byref(found), ctypes.c_size_t(MIB), None)
    left = live()
    do("cuMemFreeAsync", found, None)
    leave(4 * MIB)
    free(allocate(100))
    mapped = live()
    do("cuDevicePrimaryCtxRelease_v2", 0)
    return {"large": before, "pool": left, "end": mapped - live()}


def stream_of(kind: str) -> ctypes.c_void_p:
    made = ctypes.c_void_p(2)  # a thread's own
    if kind != "own":
        do("cuStreamCreate", ctypes.byref(made), 1)
    return made


def capture(_: int) -> dict[str, Any]:
    stream, end, graph = stream_of(sys.argv[2]), sys.argv[3], ctypes.c_void_p()
    free(allocate(512))  # what is mapped for small ones stays
    large, small = allocate(3 * MIB), allocate(512)
    do("cuStreamBeginCapture_v2", stream, 2)
    mapped = live()
    free(large)
    free(small)
    told = [address_range(place)[0] == 0 for place in (large, small)]
    refused = [CUDA.cuMemFree_v2(ctypes.c_uint64(place)) for place in (large, small)]
    held, beside = live() - mapped, [allocate(3 * MIB), allocate(512)]
    if end == "destroy":
        do("cuStreamDestroy_v2", stream)
    else:
        do("cuStreamEndCapture", stream, ctypes.byref(graph))
    mapped = live()
    if end == "synchronize":
        do("cuCtxSynchronize")
    else:
        free(beside[1])
    left = live() - mapped
    return {"told": told, "refused": refused, "held": held, "apart": large not in beside, "left": left, "same": [allocate(3 * MIB) == large, allocate(512) == small]}


def behind(_: int) -> dict[str, Any]:
    graph, stream, other, places = ctypes.c_void_p(), stream_of("made"), stream_of("made"), set()
    for name, size in (("cuMemFreeAsync", 3 * MIB), ("cuMemFreeAsync", 512), ("cuMemFreeAsync_ptsz", 3 * MIB)):
        place = allocate(size)
        do("cuMemsetD8Async", ctypes.c_uint64(place), 7, ctypes.c_size_t(size), stream)
        do(name, ctypes.c_uint64(place), stream)
        places.add(address_range(place)[0] == 0)
        places.add(allocate(size) != place)
    place = allocate(3 * MIB)
    do("cuStreamBeginCapture_v2", other, 2)
    captured = CUDA.cuMemFreeAsync(ctypes.c_uint64(place), other)
    there = address_range(place)[0] == 0
    do("cuMemFreeAsync", ctypes.c_uint64(place), stream)
    gone = address_range(place)[0] != 0
    do("cuStreamEndCapture", other, ctypes.byref(graph))
    return {"wrong": sum(places), "captured": captured, "there": there, "gone": gone, "same": allocate(3 * MIB) == place}


def gone(context: int) -> dict[str, Any]:
    place = allocate(3 * MIB)
    before = attribute(CONTEXT, place)
    do("cuDevicePrimaryCtxRelease_v2", 0)
    return {"before": before == context, "after": attribute(CONTEXT, place), "size": attribute(RANGE_SIZE, place)}


def bounds(_: int) -> dict[str, Any]:
    places = [allocate(int(sys.argv[2])) for _ in range(20)]
    ends = sorted((place, place + int(sys.argv[2])) for place in places)
    apart = all(first[1] <= second[0] for first, second in itertools.pairwise(ends))
    for place in places:
        free(place)
    return {"count": len(places), "apart": apart}


def resolver(_: int) -> dict[str, Any]:
    real = ctypes.CDLL(os.path.join(os.environ["LD_LIBRARY_PATH"].split(":")[0], "libcuda-real.so"))
    found = {}
    for name, export in NAMES.items():
        address, status = ctypes.c_void_p(), ctypes.c_int()
        do("cuGetProcAddress_v2", name.encode(), ctypes.byref(address), 13000, ctypes.c_uint64(0), ctypes.byref(status))
        found[name] = address.value == ctypes.cast(getattr(real, export or name), ctypes.c_void_p).value
    return found


def main() -> None:
    context = ctypes.c_void_p()
    do("cuInit", 0)
    do("cuDevicePrimaryCtxRetain", ctypes.byref(context), 0)
    do("cuCtxSetCurrent", context)
    modes = {each.__name__: each for each in (tell, churn, hole, full, spare, capture, behind, gone, bounds, resolver)}
    print("ANSWER", json.dumps(modes[sys.argv[1]](context.value or 0)))


if __name__ == "__main__":
    main()
