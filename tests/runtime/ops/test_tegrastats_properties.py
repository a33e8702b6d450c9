"""tegrastats: lines written from the grammar are read back, and no text breaks the parser."""
import re

import pytest

pytest.importorskip("hypothesis", reason="hypothesis draws these lines")
from hypothesis import example, given, settings, strategies as st

from jetson_det.runtime.files import InputError
from jetson_det.runtime.ops.tegrastats import Load, Memory, Rail, Sample, Temperature, parse_line

OWN_NAMES = {"RAM", "SWAP", "IRAM", "CPU", "EMC_FREQ", "GR3D_FREQ", "off"}
names = st.from_regex(r"[A-Za-z][A-Za-z0-9_.-]{0,11}", fullmatch=True).filter(lambda name: name not in OWN_NAMES)
rail_names = names | st.just("CPU") # as on an AGX Xavier
counts = st.integers(0, 999999)
percents = st.integers(0, 100)
millidegrees = st.integers(-60000, 130000)


def memory(name):
    "(text, record) of a memory."
    def write(used, total, unit, room, blocks, size, size_unit):
        scale, size_scale = (1 if u == "M" else 1 / 1024 for u in (unit, size_unit))
        text = "{} {}/{}{}B".format(name, used, total, unit)
        record = Memory(used * scale, total * scale)
        if room == "lfb":
            text += " (lfb {}x{}{}B)".format(blocks, size, size_unit)
            record = record._replace(free_blocks=blocks, block_mb=size * size_scale)
        elif room == "one lfb":
            text += "(lfb {}{}B)".format(size, size_unit)
            record = record._replace(block_mb=size * size_scale)
        elif room == "cached":
            text += " (cached {}{}B)".format(size, size_unit)
            record = record._replace(cached_mb=size * size_scale)
        return text, record
    units = st.sampled_from("kM")
    rooms = st.sampled_from(["", "lfb", "one lfb", "cached"])
    return st.builds(write, counts, counts, units, rooms, counts, counts, units)


@st.composite
def clocks(draw):
    "(text, clocks): one, or a list in brackets."
    values = draw(st.lists(counts, min_size=1, max_size=3))
    if len(values) == 1 and draw(st.booleans()): return str(values[0]), tuple(values)
    return "[{}]".format(draw(st.sampled_from([",", ", "])).join(map(str, values))), tuple(values)


@st.composite
def loads(draw):
    "(text behind the name, record)."
    kind = draw(st.sampled_from(["off", "share", "share and clock", "clock", "number"]))
    if kind == "off": return "off", Load(is_on=False)
    if kind == "number":
        mhz = draw(counts)
        return str(mhz), Load(None, (mhz,))
    percent = draw(percents)
    text, mhz = draw(clocks())
    if kind == "share": return "{}%".format(percent), Load(percent)
    if kind == "clock": return "@" + text, Load(None, mhz)
    return "{}%@{}".format(percent, text), Load(percent, mhz)


@st.composite
def cpus(draw):
    "(text, cores): a clock in each core, behind the bracket, or nowhere."
    where = draw(st.sampled_from(["core", "bracket", "nowhere"]))
    shared = draw(counts)
    words, cores = [], []
    for percent in draw(st.lists(st.none() | percents, min_size=1, max_size=6)):
        mhz = draw(counts) if where == "core" else shared
        if percent is None:
            words.append("off")
            cores.append(Load(is_on=False))
            continue
        words.append("{}%@{}".format(percent, mhz) if where == "core" else "{}%".format(percent))
        cores.append(Load(percent, () if where == "nowhere" else (mhz,)))
    after = "@{}".format(shared) if where == "bracket" else ""
    return "CPU [{}]{}".format(",".join(words), after), tuple(cores)


@st.composite
def temperatures(draw):
    name, now, highest = draw(names), draw(millidegrees), draw(st.none() | millidegrees)
    is_off = draw(st.integers(0, 5)) == 0
    text = "{}@{}C".format(name, "-256" if is_off else "{:g}".format(now / 1000))
    if highest is not None:
        if draw(st.booleans()): text = text[:-1]
        text += "/{:g}C".format(highest / 1000)
    read = lambda value: None if value is None else float("{:g}".format(value / 1000))
    return text, Temperature(name, None if is_off else read(now), read(highest))


@st.composite
def rails(draw):
    name, values = draw(rail_names), draw(st.lists(counts, min_size=2, max_size=3))
    unit = draw(st.sampled_from(["", "mW"]))
    return "{} {}".format(name, "/".join("{}{}".format(v, unit) for v in values)), Rail(name, *values)


@st.composite
def lines(draw):
    "(line, the sample that it means)."
    single = {"ram": draw(memory("RAM"))}
    for key, fields in (("swap", memory("SWAP")), ("iram", memory("IRAM")), ("cores", cpus())):
        if draw(st.booleans()): single[key] = draw(fields)
    for key, name in (("emc", "EMC_FREQ"), ("gpu", "GR3D_FREQ")):
        text, record = draw(loads())
        if draw(st.booleans()): single[key] = (name + " " + text, record)
    fields = [(key, text, record) for key, (text, record) in single.items()]
    engines = [(name + " " + text, (name, record)) for name, (text, record)
               in draw(st.lists(st.tuples(names, loads()), max_size=3))]
    for key, rows in (("engines", engines), ("temperatures", draw(st.lists(temperatures(), max_size=4))),
                      ("rails", draw(st.lists(rails(), max_size=4)))):
        fields += [(key, text, record) for text, record in rows]
    words = draw(st.lists(st.from_regex(r"[A-Za-z_]{1,8}!?", fullmatch=True), max_size=2))
    if words and not OWN_NAMES & set(words): fields.append(("unknown", " ".join(words), " ".join(words)))
    fields = draw(st.permutations(fields))
    several = {key: tuple(record for k, _, record in fields if k == key)
               for key in ("engines", "temperatures", "rails", "unknown")}
    date = draw(st.sampled_from(["", "11-30-2025 13:26:01"]))
    texts = [date] * bool(date) + [text for _, text, _ in fields]
    spaces = draw(st.lists(st.sampled_from([" ", "  ", "      ", "\t"]), min_size=len(texts), max_size=len(texts)))
    line = "".join(text + space for text, space in zip(texts, spaces)) + "\n"
    return line, Sample(date=date, **{key: record for key, (_, record) in single.items()}, **several)


@given(lines())
def test_lines_of_the_grammar_are_read_back(drawn):
    line, sample = drawn
    assert parse_line(line) == sample


alphabet = st.sampled_from(list("RAMCPU [](),/@%0123456789xkBmWoflb.-_\n\0\xa0\u0663") + ["RAM 1/2MB ", "GPU@", "off"])


@given(st.text() | st.lists(alphabet, max_size=30).map("".join))
@example("RAM 1/2MB CPU []")
@example("RAM \u0661/\u0662MB")
@example("RAM 1/2MB " + "CPU [" + "1%," * 20000)
@example("RAM 1/2MB " + "A" * 50000)
def test_no_text_breaks_the_parser(text):
    try: sample = parse_line(text)
    except InputError as error:
        assert str(error).isprintable()
        return
    assert all(word in text.split() for word in " ".join(sample.unknown).split())


@settings(max_examples=50)
@given(lines(), st.data())
def test_a_line_that_is_cut_between_fields_keeps_what_is_there(drawn, data):
    line, whole = drawn
    cut = data.draw(st.sampled_from([k for k, c in enumerate(line) if c.isspace()]))
    try: part = parse_line(line[:cut])
    except InputError:
        # the cut came before or within the one field that a line must have
        assert not re.search(r"(?<!\S)RAM \d+/\d+[kM]B(?!\S)", line[:cut])
        return
    assert part.temperatures == whole.temperatures[:len(part.temperatures)]
    assert part.rails == whole.rails[:len(part.rails)]
    assert part.ram.used_mb == whole.ram.used_mb
