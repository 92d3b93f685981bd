"""Keys and results of the cuckoo filter: numpy strings, Arrow arrays, bits, out, merge."""

import ctypes
import pickle

import numpy as np
import pytest

from pyruntime import errors
from pyruntime.filter import (
    ABSENT,
    OK,
    AbsentKeysError,
    CuckooFilter,
    FilterFullError,
)

WORDS = [
    "",
    "a",
    "word",
    "ü",
    "längeres Wort",
    "日本語",
    "😀 end",
    "x" * 300,
    "a\tb",
    "twelve bytes",
    "13 bytes long",
]


class Schema(ctypes.Structure):
    _fields_ = [
        ("format", ctypes.c_char_p),
        ("name", ctypes.c_char_p),
        ("metadata", ctypes.c_char_p),
        ("flags", ctypes.c_int64),
        ("n_children", ctypes.c_int64),
        ("children", ctypes.c_void_p),
        ("dictionary", ctypes.c_void_p),
        ("release", ctypes.c_void_p),
        ("private_data", ctypes.c_void_p),
    ]


class Array(ctypes.Structure):
    _fields_ = [
        ("length", ctypes.c_int64),
        ("null_count", ctypes.c_int64),
        ("offset", ctypes.c_int64),
        ("n_buffers", ctypes.c_int64),
        ("n_children", ctypes.c_int64),
        ("buffers", ctypes.c_void_p),
        ("children", ctypes.c_void_p),
        ("dictionary", ctypes.c_void_p),
        ("release", ctypes.c_void_p),
        ("private_data", ctypes.c_void_p),
    ]


def capsule(struct, name):
    make = ctypes.pythonapi.PyCapsule_New
    make.restype = ctypes.py_object
    make.argtypes = [ctypes.c_void_p, ctypes.c_char_p, ctypes.c_void_p]
    return make(ctypes.addressof(struct), name, None)


class Arrow:
    """What an Arrow library's array gives out, without one."""

    def __init__(self, format, buffers, length, *, offset=0, null_count=0, released=False):
        self.keep = [None if b is None else np.frombuffer(b, np.uint8) for b in buffers]
        self.pointers = (ctypes.c_void_p * len(buffers))(
            *[None if b is None else b.ctypes.data for b in self.keep]
        )
        release = None if released else 1  # never called: nothing is moved out of the capsules
        self.schema = Schema(format=format.encode(), release=release)
        self.array = Array(
            length=length,
            null_count=null_count,
            offset=offset,
            n_buffers=len(buffers),
            buffers=ctypes.addressof(self.pointers),
            release=release,
        )

    def __arrow_c_array__(self, requested_schema=None):
        return capsule(self.schema, b"arrow_schema"), capsule(self.array, b"arrow_array")


def arrow_strings(words, format="u", **options):
    raw = [word.encode() for word in words]
    offsets = np.cumsum([0] + [len(word) for word in raw])
    offsets = offsets.astype(np.int32 if format in "uz" else np.int64)
    start = options.get("offset", 0)
    buffers = [None, offsets.tobytes(), b"".join(raw) or b"\0"]
    return Arrow(format, buffers, len(words) - start, **options)


def arrow_views(words, format="vu", *, sizes=None, views=None, **options):
    """Strings of up to 12 bytes within their view, the others in one of two buffers."""
    data, entries = [bytearray(), bytearray()], bytearray()
    for i, word in enumerate(word.encode() for word in words):
        entries += np.int32(len(word)).tobytes()
        if len(word) <= 12:
            entries += word.ljust(12, b"\0")
        else:
            place = np.array([i % 2, len(data[i % 2])], np.int32)
            entries += word[:4] + place.tobytes()
            data[i % 2] += word
    sizes = np.array([len(some) for some in data], np.int64) if sizes is None else sizes
    buffers = [
        None,
        bytes(entries) or None,
        *(bytes(some) or b"\0" for some in data),
        sizes.tobytes(),
    ]
    if views is not None:
        buffers[1] = views
    return Arrow(format, buffers, len(words) - options.get("offset", 0), **options)


def view_of(length, buffer, offset):
    return np.array([length, 0, buffer, offset], np.int32).tobytes()


class Stream:
    """A producer of chunks; `fails_at` is the call that gives an error, 0 that for the schema."""

    class Struct(ctypes.Structure):
        _fields_ = [(f"call{i}", ctypes.c_void_p) for i in range(4)] + [("data", ctypes.c_void_p)]

    def __init__(self, chunks, *, format=None, fails_at=None, reason=b"no more", lacks=None):
        self.chunks, self.released, self.calls = list(chunks), 0, 0
        self.release = ctypes.CFUNCTYPE(None, ctypes.c_void_p)(self.count_release)
        release = ctypes.cast(self.release, ctypes.c_void_p).value

        def give(out, struct):
            self.calls += 1
            if self.calls - 1 == fails_at:
                return 5
            if struct is not None:
                ctypes.memmove(out, ctypes.addressof(struct), ctypes.sizeof(struct))
                type(struct).from_address(out).release = release
            return 0

        def get_schema(_, out):
            return give(out, self.schema)

        def get_next(_, out):
            at = self.calls - 1
            return give(out, self.chunks[at].array if at < len(self.chunks) else None)

        get = ctypes.CFUNCTYPE(ctypes.c_int, ctypes.c_void_p, ctypes.c_void_p)
        error = ctypes.CFUNCTYPE(ctypes.c_void_p, ctypes.c_void_p)
        self.reason = ctypes.create_string_buffer(reason) if reason else None
        self.keep = [
            get(get_schema),
            get(get_next),
            error(lambda _: self.reason and ctypes.addressof(self.reason)),
            self.release,
        ]
        form = Schema(format=format.encode()) if format else None
        self.schema = form or (self.chunks[0].schema if self.chunks else None)
        pointers = [ctypes.cast(call, ctypes.c_void_p) for call in self.keep]
        if lacks is not None:
            pointers[lacks] = None
        self.struct = self.Struct(*pointers)

    def count_release(self, struct):
        self.released += 1
        Array.from_address(struct).release = None

    def __arrow_c_stream__(self, requested_schema=None):
        self.calls = 0
        return capsule(self.struct, b"arrow_array_stream")


def integers(values, format="l", dtype=np.int64):
    return Arrow(format, [None, np.asarray(values, dtype).tobytes() or None], len(values))


def test_arrow_views_and_streams():
    words = WORDS * 4000
    filter = CuckooFilter(1000, seed=1)
    filter.insert(WORDS)
    for format in ("vu", "vz"):
        np.testing.assert_array_equal(filter.count(arrow_views(words, format)), filter.count(words))
    assert filter.contains(arrow_views(WORDS, offset=3)).tolist() == [True] * len(WORDS[3:])
    absent = [word + "!" for word in words]
    wanted = filter.contains(absent)
    np.testing.assert_array_equal(filter.contains(arrow_views(absent)), wanted)
    for make in (arrow_strings, arrow_views):
        stream = Stream([make(absent[:7]), make([]), make(absent[7:])])
        np.testing.assert_array_equal(filter.contains(stream), wanted)
        assert stream.released == 4  # the schema and three arrays
    assert filter.contains(Stream([arrow_strings(WORDS)])).all()
    assert filter.contains(Stream([], format="u")).tolist() == []
    assert filter.contains(Stream([], format="l")).tolist() == []
    numbers = CuckooFilter(1000, seed=1)
    assert numbers.insert(Stream([integers([1, -2]), integers([3])])) == 3
    assert numbers.contains([1, -2, 3]).all() and numbers.kind == "integer"
    for format, dtype in zip("cCsS", "bBhH", strict=True):
        some = integers([1, 3], format, dtype)
        assert numbers.contains(some).all()
    assert numbers.contains(integers([-2], "c", "b")).all()


class Broken:
    def __init__(self, name, give):
        setattr(self, name, lambda requested_schema=None: give)


@pytest.mark.parametrize(
    "keys",
    [
        arrow_views(["a"], views=view_of(-1, 0, 0)),
        arrow_views(["x" * 20] * 2, views=view_of(20, 2, 0) * 2),
        arrow_views(["x" * 20] * 2, views=view_of(20, -1, 0) * 2),
        arrow_views(["x" * 20] * 2, views=view_of(20, 0, 1) * 2),
        arrow_views(["x" * 20] * 2, views=view_of(20, 0, -1) * 2),
        arrow_views(["x" * 20] * 2, views=view_of(2**31 - 1, 0, 2**31 - 1) * 2),
        arrow_views(["x" * 20] * 2, sizes=np.array([-1, -(2**63)])),
        Arrow("vu", [None, view_of(20, 0, 0), b"x" * 20], 1),
        Arrow("vu", [None, view_of(20, 0, 0), b"x" * 20, None], 1),
        Arrow("vu", [None, view_of(20, 0, 0), None, np.array([20]).tobytes()], 1),
        Arrow("vu", [None, None, np.array([20]).tobytes()], 1),
        Arrow("l", [None, bytes(8)], 1, offset=2**62),
        Arrow("l", [None, bytes(8)], 2**62),
        Arrow("+s", [None], 1),
        Arrow("l", [], 1),
        Broken("__arrow_c_array__", None),
        Broken("__arrow_c_array__", (1, 2)),
        Broken("__arrow_c_array__", 2 * (capsule(Schema(), b"another"),)),
        Broken("__arrow_c_stream__", None),
        Broken("__arrow_c_stream__", capsule(Schema(), b"arrow_schema")),
        Stream([integers([1])], lacks=0),
        Stream([integers([1])], lacks=1),
        Stream([integers([1])], lacks=3),
        Stream([], format=None),
        Stream([integers([1])], format="+s"),
        Stream([integers([1]), Arrow("l", [None, None], 3)]),
        Stream([integers([1]), Arrow("l", [b"\x05", bytes(24)], 3, null_count=-1)]),
    ],
)
def test_malformed_arrow_producers_are_refused(keys):
    filter = CuckooFilter(10)
    for call in (filter.insert, filter.contains):
        with pytest.raises(errors.InvalidArgumentError):
            call(keys)
    assert len(filter) == 0 and filter.kind == ""


@pytest.mark.parametrize("fails_at", [0, 1, 2])
def test_a_stream_that_fails_says_why(fails_at):
    filter = CuckooFilter(10)
    for reason, wanted in ((b"the disk is gone", "disk is gone"), (None, "Input/output")):
        stream = Stream([integers([1]), integers([2])], fails_at=fails_at, reason=reason)
        with pytest.raises(errors.InvalidArgumentError, match=wanted):
            filter.insert(stream)
        assert stream.released == fails_at  # what it gave before
    stream = Stream([integers([1])], fails_at=1, lacks=2)
    with pytest.raises(errors.InvalidArgumentError, match="Input/output"):
        filter.insert(stream)
    assert len(filter) == 0


def test_polars_series():
    pl = pytest.importorskip("polars")
    filter = CuckooFilter(1000, seed=1)
    assert filter.insert(pl.Series(WORDS)) == len(WORDS)
    chunked = pl.concat([pl.Series(WORDS), pl.Series(["no", "more"])], rechunk=False)
    np.testing.assert_array_equal(filter.contains(chunked), filter.contains([*WORDS, "no", "more"]))
    numbers = CuckooFilter(1000, seed=1)
    numbers.insert(pl.Series([1, 2, 3]))
    assert numbers.contains(np.arange(1, 4)).all()
    with pytest.raises(errors.InvalidArgumentError, match="nulls"):
        filter.contains(pl.Series(["a", None]))


def test_every_form_of_a_string_is_the_same_key():
    words = WORDS * 3000  # more than are converted at a time
    filter = CuckooFilter(1000, seed=1)
    assert filter.insert(WORDS) == len(WORDS)
    forms = [
        words,
        np.array(words),
        np.array(words).astype(">U300"),
        np.array(words, object),
        np.array([word.encode() for word in words]),
        [word.encode() for word in words],
        np.repeat(np.array(words), 2)[::2],
        *(arrow_strings(words, format) for format in "uUzZ"),
    ]
    for form in forms:
        assert filter.contains(form).all()
        np.testing.assert_array_equal(filter.count(form), filter.count(words))
    absent = [word + "!" for word in words]
    for form in (absent, np.array(absent), arrow_strings(absent)):
        np.testing.assert_array_equal(filter.contains(form), filter.contains(absent))
    if hasattr(np.dtypes, "StringDType"):
        assert filter.contains(np.array(words, np.dtypes.StringDType())).all()


def test_arrow_slices_integers_and_validity():
    filter = CuckooFilter(1000, seed=2)
    filter.insert(WORDS[4:])
    assert filter.contains(arrow_strings(WORDS, offset=4)).tolist() == [True] * len(WORDS[4:])
    assert filter.contains(arrow_strings([])).tolist() == []
    valid = arrow_strings(WORDS, offset=4, null_count=-1)
    assert filter.contains(valid).all()
    numbers = CuckooFilter(1000, seed=2)
    values = np.array([-1, 0, 5, 7])
    assert numbers.insert(values) == 4
    for format, dtype in (("l", np.int64), ("L", np.uint64), ("i", np.int32)):
        found = numbers.contains(Arrow(format, [None, values.astype(dtype).tobytes()], 4))
        assert found.all()
    unsigned = Arrow("I", [None, np.array([5, 2**32 - 1], np.uint32).tobytes()], 2)
    assert numbers.contains(unsigned).tolist() == [True, False]
    with pytest.raises(errors.InvalidArgumentError, match="integer keys"):
        numbers.contains(arrow_strings(WORDS))


@pytest.mark.parametrize(
    "keys",
    [
        Arrow("u", [b"\x05", np.array([0, 1, 2, 3], np.int32).tobytes(), b"abc"], 3, null_count=1),
        Arrow("u", [b"\x05", np.array([0, 1, 2, 3], np.int32).tobytes(), b"abc"], 3, null_count=-1),
        Arrow("u", [None, np.array([0, 2, 1, 3], np.int32).tobytes(), b"abc"], 3),
        Arrow("u", [None, np.array([-1, 2, 2, 3], np.int32).tobytes(), b"abc"], 3),
        Arrow("u", [None, None, b"abc"], 3),
        Arrow("u", [None, b"abcd"], 0 + 1),
        Arrow("g", [None, np.zeros(3).tobytes()], 3),
        Arrow("vu", [None, bytes(64)], 3),
        Arrow("l", [None, bytes(64)], -1),
        arrow_strings(WORDS, released=True),
        np.array(["a", "\ud800"]),
        ["\ud800"],
        np.array([["a"]]),
        np.array([1, 2], ">i8").astype(">f8"),
    ],
)
def test_keys_that_are_refused(keys):
    filter = CuckooFilter(10)
    with pytest.raises(errors.InvalidArgumentError):
        filter.insert(keys)
    assert len(filter) == 0 and filter.kind == ""


def test_pyarrow_arrays():
    pa = pytest.importorskip("pyarrow")
    filter = CuckooFilter(1000, seed=1)
    assert filter.insert(pa.array(WORDS)) == len(WORDS)
    assert filter.contains(pa.array(WORDS, pa.large_string()).slice(2)).all()
    assert filter.contains(WORDS).all()
    assert filter.contains(pa.chunked_array([WORDS[:3], WORDS[3:]])).all()
    assert filter.contains(pa.array(WORDS, pa.string_view()).slice(2)).all()
    assert filter.contains(pa.chunked_array([WORDS], pa.large_string())).all()
    with pytest.raises(errors.InvalidArgumentError, match="nulls"):
        filter.contains(pa.array(["a", None]))


def test_integers_of_the_other_byte_order():
    filter = CuckooFilter(100, seed=1)
    filter.insert([1, -2, 300])
    for dtype in (">i8", ">i4", "<i8", "<i4"):
        assert filter.contains(np.array([1, -2, 300], dtype)).all()


@pytest.mark.parametrize("n", [0, 1, 7, 8, 9, 1000, 200_001])
@pytest.mark.parametrize("grown", [False, True])
def test_bits_are_packed_as_numpy_does(n, grown):
    filter = CuckooFilter(100_000, seed=3)
    filter.insert(np.arange(0, 60_000, 3))
    if grown:
        filter.grow()
        filter.insert(np.arange(1, 60_000, 3))
    keys = np.arange(n)
    wanted = np.packbits(filter.contains(keys), bitorder="little")
    np.testing.assert_array_equal(filter.contains(keys, bits=True), wanted)
    out = np.full((n + 7) // 8, 255, np.uint8)
    assert filter.contains(keys, bits=True, out=out) is out
    np.testing.assert_array_equal(out, wanted)


def test_results_go_where_the_caller_says():
    filter = CuckooFilter(1000, seed=4)
    keys = np.arange(100)
    status = np.full(100, 9, np.uint8)
    assert filter.insert(keys, out=status) == 100
    assert filter.status is status and (status == OK).all()
    answer = np.zeros(100, bool)
    assert filter.contains(keys, out=answer) is answer and answer.all()
    counts = np.zeros(100, np.uint32)
    assert filter.count(keys, out=counts) is counts and (counts >= 1).all()
    assert filter.delete(keys[:50], out=status[:50]) == 50
    assert filter.delete(keys[:50], out=status[:50]) == 0 and (status[:50] == ABSENT).all()
    frozen = np.zeros(100, bool)
    frozen.flags.writeable = False
    for out in (
        np.zeros(99, bool),
        np.zeros(100, np.uint8),
        np.zeros((10, 10), bool),
        np.zeros(200, bool)[::2],
        frozen,
        [False] * 100,
        keys.view(bool)[:100],
    ):
        with pytest.raises(errors.InvalidArgumentError, match="out must"):
            filter.contains(keys, out=out)
    before = filter.to_bytes()
    for call in (filter.insert, filter.delete):
        with pytest.raises(errors.InvalidArgumentError, match="out must"):
            call(keys, out=np.zeros(100, bool))
        with pytest.raises(errors.InvalidArgumentError, match="share memory"):
            call(keys, out=keys.view(np.uint8)[:100])
    assert filter.to_bytes() == before


def test_errors_say_which_keys():
    filter = CuckooFilter(1000, seed=5)
    filter.insert(np.arange(10))
    with pytest.raises(AbsentKeysError, match="2 of 4") as absent:
        filter.delete([1, 50, 2, 51], must_exist=True)
    assert absent.value.mask.tolist() == [False, True, False, True]
    assert len(filter) == 8
    strict = CuckooFilter(10, seed=4, on_full="raise")
    with pytest.raises(FilterFullError, match="no room") as full:
        strict.insert(np.arange(1000))
    assert full.value.stored == len(strict) == (full.value.status == OK).sum()


def test_merge():
    one, two = (CuckooFilter(1000, seed=6) for _ in range(2))
    one.insert(WORDS)
    two.insert([f"{i}" for i in range(500)])
    two.grow()
    two.insert([f"{i}" for i in range(500, 1500)])
    one.merge(two)
    assert len(one) == 1500 + len(WORDS) and len(two) == 1500
    assert one.contains(WORDS).all() and one.contains([f"{i}" for i in range(1500)]).all()
    one.delete(WORDS, must_exist=True)
    assert one.contains([f"{i}" for i in range(1500)]).all()
    one.verify()
    fresh = CuckooFilter(1000, seed=6)
    fresh.merge(two)
    assert fresh.kind == "string" and fresh.contains(["7"]).all()
    numbers = CuckooFilter(1000, seed=6)
    numbers.insert([1])
    for other in (
        numbers,
        one,
        CuckooFilter(1000, seed=7),
        CuckooFilter(2000, seed=6),
        CuckooFilter(1000, seed=6, bits=8),
        CuckooFilter(1000, seed=6, slots=16),
        "filter",
    ):
        with pytest.raises(errors.InvalidArgumentError):
            one.merge(other)
    full = CuckooFilter(1000, seed=6)
    full.insert([f"x{i}" for i in range(1000)])
    before = full.to_bytes()
    with pytest.raises(errors.CapacityError):
        full.merge(two)
    assert full.to_bytes() == before


def test_merge_takes_from_a_mapped_file_but_not_into_one(tmp_path):
    filter = CuckooFilter(1000, seed=8)
    filter.insert([1, 2, 3])
    filter.save(tmp_path / "f")
    mapped = CuckooFilter.mmap(tmp_path / "f")
    filter.merge(mapped)
    assert filter.count([1, 2, 3]).tolist() == [2, 2, 2]
    with pytest.raises(errors.StateError):
        mapped.merge(filter)


def test_the_kind_of_keys_is_kept(tmp_path):
    filter = CuckooFilter(1000)
    filter.insert(np.array(["a"]))
    filter.save(tmp_path / "f")
    for again in (
        CuckooFilter.load(tmp_path / "f"),
        CuckooFilter.mmap(tmp_path / "f"),
        pickle.loads(pickle.dumps(filter)),
    ):
        assert again.kind == "string"
        for call in (again.contains, again.count, again.insert, again.delete):
            with pytest.raises(errors.InvalidArgumentError, match="string keys"):
                call(np.arange(3))
