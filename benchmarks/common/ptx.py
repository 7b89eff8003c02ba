"""NVIDIA's assembly language (PTX) and what ptxas says of it: lints of wgmma."""

import re
from dataclasses import dataclass

from benchmarks.common.sass import reach

# from this release of ptxas on the registers of a wgmma's left operand stay until it has read them
KEEPS_OPERANDS = (13, 3)
# groups of wgmma in flight that are told apart: no kernel leaves as many
MOST_PENDING = 8

_WGMMA = re.compile(r"wgmma\.mma_async\S*\s*\{([^}]*)\}\s*,\s*(?:\{([^}]*)\})?")
_WAIT = re.compile(r"wgmma\.wait_group\S*\s+(\d+)")
_BRANCH = re.compile(r"\bbra(?:\.uni)?\s+([$%\w]+)")
_DEFINES = re.compile(r"^(?!st\.|red\.|bar\.|bra|@|cp\.async)[a-z][\w.:]*\s+(?:\{([^}]*)\}|(%\w+)(?:\|(%\w+))?)\s*,")
_SERIALISED = re.compile(
    r"\((C\d+)\)[^\n]*?wgmma\.mma_async instructions are serialized due to ([^\n]*?)\s+(?:in|for) the function"
)


@dataclass(frozen=True)
class Statement:
    """One statement: its place, the predicate that guards it (or nothing) and its text."""

    line: int
    guard: str
    text: str


def parse(text: str) -> tuple[list[Statement], dict[str, int]]:
    """Read the statements of a module, and before which of them each label stands."""
    statements: list[Statement] = []
    labels: dict[str, int] = {}
    started, parts = 0, ""
    for number, line in enumerate(text.splitlines(), 1):
        code = line.partition("//")[0].strip()
        label = re.match(r"([$%\w]+):\s*", code) if not parts else None
        if label is not None:
            labels[label[1]] = len(statements)
            code = code[label.end() :]
        if not parts:
            # the braces of a scope, and directives, which have no semicolon
            code = "" if code.startswith((".", "(", ")")) else code.lstrip("{}")
        for index, piece in enumerate(code.split(";")):
            if index:
                _add(statements, started, parts)
                parts = ""
            if piece.strip():
                started = started if parts else number
                parts = f"{parts} {piece.strip()}".strip()
    return statements, labels


def _add(statements: list[Statement], line: int, text: str) -> None:
    text = text.lstrip("{} ")
    predicate = re.match(r"(?:(@!?[%\w]+)\s+)?", text)
    if text and predicate is not None:
        statements.append(Statement(line, predicate[1] or "", text[predicate.end() :]))


def _following(statements: list[Statement], labels: dict[str, int]) -> list[list[int]]:
    successors = []
    for place, statement in enumerate(statements):
        jump = _BRANCH.match(statement.text)
        leaves = re.match(r"(ret|exit|trap)\b", statement.text) is not None
        following = [labels[jump[1]]] if jump is not None and jump[1] in labels else []
        if statement.guard or not (leaves or jump is not None):
            following.append(place + 1)
        successors.append([target for target in following if target < len(statements)])
    return successors


def pending_operands(text: str) -> list[str]:
    """Name the wgmma that stay pending too long with their left operand in registers. That is behind a wait, or a
    change of those registers.

    Until 13.3 ptxas may reuse the registers before they were read (Triton issue 9433), so such a product has to be
    complete at the first wait after it: a wait with 0 pending, or with no more than what was started later.
    """
    if "wgmma.mma_async" not in text:
        return []
    statements, labels = parse(text)
    products = [_WGMMA.search(statement.text) for statement in statements]
    operands = [
        frozenset(re.findall(r"%\w+", product[2])) if product is not None and product[2] else frozenset()
        for product in products
    ]

    # a state: groups in flight, oldest first, each the products with operands in registers; the last is still open
    def step(place: int, states: frozenset[tuple[frozenset[int], ...]]) -> frozenset[tuple[frozenset[int], ...]]:
        statement = statements[place]
        if products[place] is not None:
            own = frozenset([place]) if operands[place] else frozenset()
            return frozenset((*state[:-1], state[-1] | own) for state in states or {(frozenset(),)})
        if statement.text.startswith("wgmma.commit_group"):
            return frozenset((*state, frozenset())[-MOST_PENDING:] for state in states or {(frozenset(),)})
        wait = _WAIT.match(statement.text)
        if wait is None:
            return states
        return frozenset((*state[:-1][max(len(state) - 1 - int(wait[1]), 0) :], state[-1]) for state in states)

    before = reach(_following(statements, labels), step)
    reasons: dict[int, str] = {}
    for place, states in enumerate(before):
        statement = statements[place]
        wait = _WAIT.match(statement.text)
        if wait is not None:
            for product in {one for state in step(place, states) for group in state[:-1] for one in group}:
                reasons.setdefault(product, f"wait_group {wait[1]} in line {statement.line}")
            continue
        defined = _defined(statement.text)
        if defined:
            for product in {one for state in states for group in state for one in group}:
                if operands[product] & defined:
                    reasons.setdefault(product, f"a change of its registers in line {statement.line}")
    return [
        f"wgmma in line {statements[product].line} pending behind {what}" for product, what in sorted(reasons.items())
    ]


def _defined(text: str) -> frozenset[str]:
    match = _DEFINES.match(text)
    return frozenset(re.findall(r"%\w+", " ".join(filter(None, match.groups())))) if match is not None else frozenset()


def serialised(log: str) -> list[str]:
    """Return the reasons, with their numbers, for which ptxas says that it serialised wgmma. Each comes once."""
    return [f"{code}: {' '.join(why.split())}" for code, why in dict.fromkeys(_SERIALISED.findall(log))]
