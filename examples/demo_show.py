"""How the demo looks: the streamed text, the table and the chart."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

from rich.console import Console
from rich.table import Table
from rich.text import Text

from demo_run import COLD, MODES, TITLES, WARM, WITHOUT, Answer, Engine, Point, same_tokens

COLOURS = {"torch": "#d1495b", "keras": "#00798c"}


def streamer(console: Console) -> Callable[[str], None]:
    """A function that prints what is new in a growing text."""
    printed = ""

    def show(text: str) -> None:
        nonlocal printed
        text = text.rstrip("\N{REPLACEMENT CHARACTER}")  # half a character: its other bytes come with the next token
        new, printed = text[len(printed) :], text
        console.print(Text(new.replace("\n", " "), "green"), end="", soft_wrap=True)
        console.file.flush()

    return show


def table(engine: Engine, answers: Sequence[Answer]) -> Table:
    """One framework's answers, question by question."""
    stats = engine.cache.stats()
    allocated = f"{stats.num_blocks} blocks of {stats.block_size} tokens, {stats.bytes / 2**20:.0f} MiB allocated"
    result = Table(title=f"{engine.title}: {engine.checkpoint.name}", caption=f"cache: {allocated}")
    result.add_column("", justify="right")
    result.add_column("")
    for name in ("new\ntokens", "tokens\nequal", "prefill\nseconds", "ms per\ntoken", "prefix\nreused", "cache\nMiB"):
        result.add_column(name, justify="right")
    for number, question in enumerate(dict.fromkeys(answer.question for answer in answers), 1):
        rows = sorted((a for a in answers if a.question == question), key=lambda a: MODES.index(a.mode))
        for row in rows:
            cached = row.mode != WITHOUT
            equal = ("yes" if row.tokens == rows[0].tokens else "[bold red]NO") if cached else ""
            result.add_row(
                str(number) if row is rows[0] else "",
                row.mode,
                str(len(row.tokens)),
                equal,
                f"{row.prefill_seconds:.2f}",
                "" if row.ms_per_token is None else f"{row.ms_per_token:.0f}",
                f"{row.reused_tokens} of {row.prompt_tokens}" if cached else "",
                f"{row.cache_bytes / 2**20:.1f}" if cached else "",
                end_section=row is rows[-1],
            )
    return result


def verdicts(answers: Sequence[Answer]) -> list[tuple[bool, str]]:
    """What was to be shown, each with whether it held."""
    result = []
    frameworks = list(dict.fromkeys(answer.framework for answer in answers))
    for name in frameworks:
        own = [answer for answer in answers if answer.framework == name]
        equal = same_tokens(own)
        seconds = {mode: sum(answer.seconds for answer in own if answer.mode == mode) for mode in MODES}
        said = "the same tokens with and without the cache" if equal else "DIFFERENT tokens with and without the cache"
        times = f"{seconds[WITHOUT]:.1f} s without cache, {seconds[COLD]:.1f} s with it, {seconds[WARM]:.1f} s warm"
        result.append((equal, f"{TITLES[name]}: {said}; all answers took {times}"))
    if len(frameworks) > 1:
        equal = same_tokens(answers)
        both = " and ".join(TITLES[name] for name in frameworks)
        result.append((equal, f"{both} produced {'the same' if equal else 'DIFFERENT'} tokens"))
    return result


def chart(points: Sequence[Point], model: str, path: Path) -> None:
    """Milliseconds per new token against context length, as a PNG."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt
    from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter, NullLocator

    figure, axes = plt.subplots(figsize=(8, 5), layout="constrained")
    for name in dict.fromkeys(point.framework for point in points):
        for cached in (False, True):
            line = [point for point in points if point.framework == name and point.cached == cached]
            axes.plot(
                [point.context for point in line],
                [point.ms for point in line],
                color=COLOURS[name],
                linestyle="-" if cached else "--",
                marker="o" if cached else "s",
                label=f"{TITLES[name]}, {'with' if cached else 'without'} cache",
            )
    axes.set(xscale="log", yscale="log", xlabel="context, tokens", ylabel="milliseconds per new token")
    contexts = sorted({point.context for point in points})
    axes.set_xticks(contexts, [f"{context:,}" for context in contexts])
    axes.xaxis.set_minor_locator(NullLocator())
    axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axes.yaxis.set_minor_formatter(NullFormatter())
    axes.yaxis.set_major_formatter(FuncFormatter(lambda ms, _: f"{ms:,.0f}"))
    axes.grid(which="both", alpha=0.25)
    axes.legend(frameon=False)
    axes.set_title(f"Time of one new token, {model}")
    figure.savefig(path, dpi=130)
    plt.close(figure)
