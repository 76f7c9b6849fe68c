"""PTX text to instructions with resolved operands (PTX ISA 9.0, chapters 4 and 5)."""

from __future__ import annotations

import functools
import re
import struct
from dataclasses import dataclass, field, replace

WIDTHS = {"pred": 1, "f16x2": 32, "bf16x2": 32, "bf16": 16, "tf32": 32, "b128": 128} | {
    f"{kind}{size}": size for kind in "bus" for size in (8, 16, 32, 64)
} | {"f16": 16, "f32": 32, "f64": 64}  # fmt: skip


class PtxError(Exception):
    """What is wrong with a kernel, or with how it was launched."""


@dataclass(frozen=True)
class Register:
    index: int
    width: int
    name: str
    negated: bool = False


@dataclass(frozen=True)
class Immediate:
    text: str


@dataclass(frozen=True)
class Symbol:
    """A variable, a label, a special register, or ``_``."""

    name: str


@dataclass(frozen=True)
class Vector:
    items: tuple


@dataclass(frozen=True)
class Pair:
    """``d|p``"""

    first: object
    second: object


@dataclass(frozen=True)
class Address:
    base: object
    offset: int


@dataclass(frozen=True)
class Instruction:
    line: int
    source: str  # file:line of .loc
    text: str
    guard: Register | None
    opcode: str
    operands: tuple

    @property
    def parts(self) -> list[str]:
        return self.opcode.split(".")


@dataclass
class Variable:
    name: str
    space: str
    size: int
    align: int
    data: bytes = b""


@dataclass
class Kernel:
    name: str
    params: list[Variable]
    variables: list[Variable] = field(default_factory=list)  # shared and local
    registers: list[Register] = field(default_factory=list)
    instructions: list[Instruction] = field(default_factory=list)
    labels: dict[str, int] = field(default_factory=dict)
    tables: dict[str, list[str]] = field(default_factory=dict)  # of branch targets


@dataclass
class Module:
    kernels: dict[str, Kernel] = field(default_factory=dict)
    variables: list[Variable] = field(default_factory=list)


def _statements(text: str):
    """(line, statement); scopes are the statements "{" and "}", labels end with a colon."""
    lines, skipped = [], False
    for line in re.sub(r"/\*.*?\*/", lambda m: "\n" * m[0].count("\n"), text, flags=re.S).split(
        "\n"
    ):
        line = line.split("//")[0].strip() if '"' not in line else line.strip()
        if line.startswith(".section"):
            skipped = True
        if skipped:
            skipped, line = not line.endswith("}"), ""
        elif re.match(r"\.(version|target|address_size)\b", line):
            line = ""
        elif re.match(r"\.(loc|file)\b", line):  # the two that nothing ends
            line += ";"
        lines.append(line)
    number, buffer, start, inside, depth = 1, "", 1, 0, 0
    for token in re.findall(r'"[^"]*"|[;{}:\n]|[^;{}:\n"]+', "\n".join(lines)):
        if token == "\n":
            number += 1
            buffer += " " if buffer else ""
            continue
        if not buffer.strip():
            buffer, start = "", number
        header = re.search(r"\.(entry|func)\b", buffer) and depth == 0
        if token == "{" and (not buffer or header):
            if buffer:
                yield start, buffer.strip()
            yield number, "{"
            buffer, depth = "", depth + 1
        elif token == "}" and not buffer:
            yield number, "}"
            depth -= 1
        elif token == ";" and not inside:
            if buffer:
                yield start, " ".join(buffer.split())
            buffer = ""
        elif token == ":" and re.fullmatch(r"[\w$%]+\s*", buffer):
            yield start, buffer.strip() + ":"
            buffer = ""
        else:
            inside += (token == "{") - (token == "}")
            buffer += token if buffer else token.lstrip()


def split_operands(text: str) -> list[str]:
    """At commas outside of brackets."""
    found, depth, current = [], 0, ""
    for c in text:
        depth += (c in "{[(") - (c in "}])")
        if c == "," and depth == 0:
            found.append(current.strip())
            current = ""
        else:
            current += c
    return [*found, current.strip()] if current.strip() else found


def integer(text: str) -> int:
    text = text.rstrip("U")
    sign, text = (-1, text[1:]) if text[0] == "-" else (1, text)
    if re.fullmatch(r"0[0-7]+", text):
        return sign * int(text, 8)
    return sign * int(text, 0)


def immediate_bits(text: str, kind: str) -> int:
    """The bits of a literal as an operand of a type."""
    if match := re.fullmatch(r"(-?)0([fFdD])([0-9a-fA-F]+)", text):
        bits, size = int(match[3], 16), match[2] in "dD"
        value = struct.unpack("<d" if size else "<f", bits.to_bytes(8 if size else 4, "little"))[0]
        if kind == "f64" and not size:
            bits = int.from_bytes(struct.pack("<d", value), "little")
        return bits
    if kind in ("f32", "f64") and ("." in text or "e" in text or "x" not in text):
        return int.from_bytes(struct.pack("<f" if kind == "f32" else "<d", float(text)), "little")
    return integer(text) % (1 << WIDTHS[kind])


class _Body:
    """Reads the statements of a kernel; names are looked up from the innermost scope outwards."""

    def __init__(self, kernel: Kernel) -> None:
        self.kernel, self.scopes, self.location, self.files = kernel, [], "", {}
        self.opened: list[tuple[int, dict[str, str]]] = []  # first instruction, labels of a scope

    def declare(self, kind: str, names: str) -> None:
        width = WIDTHS[kind]
        for name in split_operands(names):
            if match := re.fullmatch(r"(.+)<(\d+)>", name):
                base, count = match[1], int(match[2])
                self.scopes[-1] |= {f"{base}{i}": self.register(f"{base}{i}", width)
                                    for i in range(count)}  # fmt: skip
            else:
                self.scopes[-1][name] = self.register(name, width)

    def register(self, name: str, width: int) -> Register:
        made = Register(len(self.kernel.registers), width, name)
        self.kernel.registers.append(made)
        return made

    def operand(self, text: str):
        for scope in reversed(self.scopes):
            if text in scope:
                return scope[text]
        if text[0] == "{":
            return Vector(tuple(self.operand(x) for x in split_operands(text[1:-1])))
        if text[0] == "(":
            return tuple(self.operand(x) for x in split_operands(text[1:-1]))
        if text[0] == "[":
            inner = split_operands(text[1:-1])
            match = re.fullmatch(r"([^+]+?)\s*(?:\+\s*(-?\w+))?", inner[0])
            return Address(self.operand(match[1].strip()), integer(match[2]) if match[2] else 0)
        if text[0] == "!":
            found = self.operand(text[1:].strip())
            return Register(found.index, found.width, found.name, not found.negated)
        if "|" in text:
            return Pair(*(self.operand(x.strip()) for x in text.split("|")))
        if text[0].isdigit() or text[0] == "-":
            return Immediate(text)
        if match := re.fullmatch(r"([\w$]+)\s*\+\s*(\d+)", text):
            return Address(Symbol(match[1]), int(match[2]))
        return Symbol(text)

    def statement(self, line: int, text: str) -> None:
        kernel = self.kernel
        if text == "{":
            self.scopes.append({})
            self.opened.append((len(kernel.instructions), {}))
        elif text == "}":
            self.scopes.pop()
            self.rename(*self.opened.pop())
            if not self.scopes:
                self.instruction(line, "ret")  # for labels at the end
        elif text.endswith(":"):
            name = self.label = text[:-1].strip()
            if len(self.scopes) > 1:  # the same assembly may be inlined again
                self.label = f"{name}, line {line}, {len(kernel.labels)}"
                self.opened[-1][1][name] = self.label
            kernel.labels[self.label] = len(kernel.instructions)
        elif text.startswith(".branchtargets"):
            kernel.tables[self.label] = split_operands(text.removeprefix(".branchtargets"))
        elif text.startswith(".loc "):
            _, file, row, *_ = text.split()
            self.location = f"{self.files.get(file, file)}:{row}"
        elif text.startswith(".reg"):
            kind, names = re.fullmatch(r"\.reg\s+\.(\w+)\s+(.*)", text).groups()
            self.declare(kind, names)
        elif re.match(r"\.(shared|local)\b", text):
            kernel.variables += variables(line, text)
        elif text.startswith(".param"):  # of a call
            kind, name = re.search(r"\.(\w+)\s+([\w$]+)(?:\[\d+\])?$", text).groups()
            self.scopes[-1][name] = self.register(name, WIDTHS[kind])
        elif not text.startswith("."):
            self.instruction(line, text)

    def rename(self, start: int, labels: dict[str, str]) -> None:
        """Labels of a scope that ends, in its instructions."""
        instructions = self.kernel.instructions
        for at in range(start, len(instructions) if labels else start):
            operands = (
                Symbol(labels.get(x.name, x.name)) if isinstance(x, Symbol) else x
                for x in instructions[at].operands
            )
            instructions[at] = replace(instructions[at], operands=tuple(operands))

    def instruction(self, line: int, text: str) -> None:
        match = re.fullmatch(r"(?:@(!?)\s*(\S+)\s+)?([\w.:]+)\s*(.*)", text)
        if match is None:
            raise PtxError(f"line {line}: cannot read `{text}`")
        negated, guard, opcode, rest = match.groups()
        if guard:
            guard = self.operand(negated + guard)
        operands = tuple(self.operand(x) for x in split_operands(rest))
        self.kernel.instructions.append(
            Instruction(line, self.location, text, guard, opcode, operands)
        )


def variables(line: int, text: str) -> list[Variable]:
    """The variables of a declaration outside of parameters, with their values as bytes."""
    pattern = (r"((?:\.\w+\s+)*?)\.(global|const|shared|local)((?:\s+\.\w+(?:\s+\d+(?=\s))?)*)\s+"
               r"([\w$.]+)((?:\[\d*\])*)\s*(?:=\s*(.*))?")  # fmt: skip
    match = re.fullmatch(pattern, text)
    if match is None:
        raise PtxError(f"line {line}: cannot read `{text}`")
    _, space, rest, name, dimensions, values = match.groups()
    kind = re.findall(r"\.(\w+)", rest)[-1]
    align = re.search(r"\.align\s+(\d+)", rest)
    item = WIDTHS[kind] // 8
    size = item
    for dimension in re.findall(r"\[(\d*)\]", dimensions):
        size *= int(dimension or 0)
    data = b"".join(
        immediate_bits(x, kind).to_bytes(item, "little")
        for x in re.findall(r"[^\s{},]+", values or "")
    )
    return [Variable(name, space, size, int(align[1]) if align else item, data)]


def parameters(text: str) -> list[Variable]:
    found = []
    for declaration in split_operands(text):
        match = re.fullmatch(r"\.param\s+(.*?)([\w$]+)(?:\[(\d+)\])?", declaration)
        kind = [x for x in re.findall(r"\.(\w+)", match[1]) if x in WIDTHS][0]
        align = re.match(r"\.align\s+(\d+)", match[1])
        item = WIDTHS[kind] // 8
        found.append(
            Variable(match[2], "param", item * int(match[3] or 1), int(align[1]) if align else item)
        )
    return found


@functools.lru_cache
def parse(text: str) -> Module:
    module, body, depth, files = Module(), None, 0, {}
    for line, statement in _statements(text):
        if statement.startswith(".file"):
            _, number, path, *_ = statement.split()
            files[number] = path.strip('",').rsplit("/", 1)[-1]
        elif depth == 0 and (match := re.search(r"\.entry\s+([\w$]+)\s*(\((.*?)\))?", statement)):
            kernel = Kernel(match[1], parameters(match[3] or ""))
            module.kernels[kernel.name] = kernel
            body = _Body(kernel)
        elif depth == 0 and re.search(r"\.func\b", statement):
            body = None
        elif statement == "{" or statement == "}":
            depth += 1 if statement == "{" else -1
            if body:
                body.statement(line, statement)
            if depth == 0:
                body = None
        elif depth and body:
            body.files = files
            body.statement(line, statement)
        elif depth == 0 and re.search(r"\.(global|const|shared)\b", statement):
            module.variables += variables(line, statement)
    # Line tables name files at the end of the text.
    for kernel in module.kernels.values():
        kernel.instructions = [
            replace(i, source=":".join([files.get(s[0], s[0]), *s[1:]]))
            for i in kernel.instructions for s in [i.source.split(":")]
        ]  # fmt: skip
    return module
