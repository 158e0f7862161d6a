"""The report's tables as rows of text, from what report.json holds; Markdown, HTML and the terminal lay them out.

Methods stand in the order of the main metric, the best first, so that tables of many methods stay readable.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from proper_ds.evaluation.bootstrap import MIN_USERS
from proper_ds.evaluation.compare import ABOVE, BELOW, TOO_FEW, WITHIN

TAUGHT = "†"
MARKS = {BELOW: "▼", WITHIN: "≈", ABOVE: "", None: ""}
TAUGHT_LINE = "weights shared by all users learned from the histories of users who are asked, too."
UNKNOWN = "?"
Pair = dict[str, Any]


def number(value: float) -> str:
    """A score as it is printed everywhere; nothing is -0.000."""
    return f"{round(value, 3) + 0.0:.3f}"


def signed(gain: float) -> str:
    """A difference of scores with its sign."""
    return f"{round(gain, 3) + 0.0:+.3f}"


def span(interval: list[float] | None) -> str:
    """An interval as it is printed everywhere; of too few users there is none."""
    if interval is None:
        return f"({TOO_FEW})"
    return f"[{number(interval[0])}, {number(interval[1])}]"


def base_text(about: dict[str, Any]) -> str:
    """How large a protocol's base is, and whether the run made it."""
    made = about.get("base_made_in_steps")  # reports of earlier versions do not say it
    return f"{about['base_parameters']:,} parameters" + (f", made by base.create in {made} steps" if made else "")


def gain_text(pair: Pair) -> str:
    """A difference as it is printed everywhere; it says so where it is beyond the interval."""
    beyond = f" {pair['verdict']}" if pair["verdict"] in ("better", "worse") else ""
    return f"{signed(pair['gain'])} {span(pair['interval'])}{beyond}"


def main_metric(report: dict[str, Any], task: str) -> str:
    """The first metric of a task: the one that plots and short tables show."""
    return next(iter(report["tasks"][task]["metrics"]))


def ranking(report: dict[str, Any], task: str) -> list[str]:
    """The methods that answered a task, the best first by the main metric."""
    metric = main_metric(report, task)
    sign = -1 if report["tasks"][task]["metrics"][metric] else 1
    there = [method for method, tasks in report["methods"].items() if task in tasks]
    return sorted(there, key=lambda method: sign * report["methods"][method][task][metric]["value"])


def mark(report: dict[str, Any], task: str, method: str) -> str:
    """The signs of a method that is not, or not beyond the interval, better than the best floor, and of one whose
    shared weights learned from users who are asked."""
    floor = report["tasks"][task]["floor"]
    about = floor["methods"].get(method) if floor else None
    return (TAUGHT if method in report["taught_by_asked"] else "") + (MARKS[about["standing"]] if about else "")


def sign_line(report: dict[str, Any], task: str) -> str:
    """What the signs mean; "" where there can be none."""
    floor, parts = report["tasks"][task]["floor"], []
    if floor is not None:
        parts.append(
            f"{MARKS[BELOW]}: not better in {floor['metric']} than {floor['than']}, the best without a language model;"
            f" {MARKS[WITHIN]}: better, but not beyond the interval of the paired difference."
        )
    if set(report["taught_by_asked"]) & set(ranking(report, task)):
        parts.append(f"{TAUGHT}: {TAUGHT_LINE}")
    return " ".join(parts)


def title_of(report: dict[str, Any], task: str) -> str:
    """The task's heading; generated data is called so."""
    about = report["tasks"][task]
    kind = "GENERATED data, " if about["generated"] else ""
    return f"{task} ({kind}{about['lamp_id']}: {about['num_questions']} questions of {about['num_users']} users)"


def results_header(report: dict[str, Any], task: str) -> list[str]:
    """Column titles that go with `results_rows`; the arrow says which way is better."""
    titles = ["method"]
    for metric, higher in report["tasks"][task]["metrics"].items():
        titles += [f"{metric} {'↑' if higher else '↓'}", "user mean"]
    return titles


def results_rows(report: dict[str, Any], task: str) -> Iterator[tuple[str, list[str]]]:
    """(method with its sign, for each metric `value [interval]` and user mean) of one task."""
    for method in ranking(report, task):
        cells = []
        for metric in report["tasks"][task]["metrics"]:
            entry = report["methods"][method][task][metric]
            cells += [f"{number(entry['value'])} {span(entry['interval'])}", number(entry["user_mean"])]
        yield f"{method} {mark(report, task, method)}".strip(), cells


def pair_of(pairs: list[Pair], method: str, than: str) -> Pair | None:
    """One comparison out of a list of them."""
    return next((pair for pair in pairs if pair["method"] == method and pair["than"] == than), None)


def references_of(report: dict[str, Any], task: str) -> list[str]:
    """The methods that the others are compared with in a task, of those that answered it."""
    there = {pair["than"] for pair in report["tasks"][task]["comparisons"][main_metric(report, task)]}
    return [name for name in report["protocol"]["references"] if name in there]


def difference_table(report: dict[str, Any], task: str) -> tuple[list[str], list[list[str]]]:
    """(header, rows): every method against the references and the best floor, by the main metric."""
    about, metric = report["tasks"][task], main_metric(report, task)
    references, floor = references_of(report, task), about["floor"]
    header = ["method", *(f"over {name}" for name in references), *([f"over {floor['than']}"] if floor else [])]
    rows = []
    for method in ranking(report, task):
        pairs = [pair_of(about["comparisons"][metric], method, than) for than in references]
        cells = [gain_text(pair) if pair else "" for pair in pairs]
        if floor:
            stands = floor["methods"].get(method)
            cells.append(f"{signed(stands['gain'])} {span(stands['interval'])}" if stands else "")
        rows.append([method, *cells])
    return header, rows if len(header) > 1 else []


def user_mean_table(report: dict[str, Any], task: str) -> tuple[list[str], list[list[str]]]:
    """(header, rows): the same of the means of users' own values, by the main metric."""
    about, metric = report["tasks"][task], main_metric(report, task)
    references = references_of(report, task)
    rows = []
    for method in ranking(report, task):
        entry = report["methods"][method][task][metric]
        pairs = [pair_of(about["comparisons"][metric], method, than) for than in references]
        gains = [f"{signed(p['user_mean_gain'])} {span(p['user_mean_interval'])}" if p else "" for p in pairs]
        rows.append([method, f"{number(entry['user_mean'])} {span(entry['user_mean_interval'])}", *gains])
    return ["method", f"{metric}, mean over users", *(f"over {name}" for name in references)], rows


def history_table(report: dict[str, Any], task: str) -> tuple[list[str], list[list[str]]]:
    """(header, rows): the main metric by history length, and of cold users and halves."""
    about, metric = report["tasks"][task], main_metric(report, task)
    slices = about["by_history"] + about["parts"]
    header = ["method"] + [
        f"{one.get('part', '')} {one['history']} items ({one['num_users']} users)".strip() for one in slices
    ]
    rows = [
        [method, *(number(one["methods"][method][metric]["value"]) for one in slices)]
        for method in ranking(report, task)
    ]
    return header, rows


def halves_table(report: dict[str, Any], task: str) -> tuple[list[str], list[list[str]]]:
    """(header, rows): every method against the references, in the lower and the upper half of history length."""
    about, metric = report["tasks"][task], main_metric(report, task)
    halves = [part for part in about["parts"] if part["part"] != "cold"]
    references = references_of(report, task)
    header = ["method", *(f"{half['part']}: over {name}" for half in halves for name in references)]
    rows = []
    for method in ranking(report, task):
        pairs = [pair_of(half["comparisons"][metric], method, name) for half in halves for name in references]
        rows.append([method, *(gain_text(pair) if pair else "" for pair in pairs)])
    return header, rows if len(header) > 1 else []


def _known(value: float | None, form: str) -> str:
    return UNKNOWN if value is None else format(value, form)


def cost_table(report: dict[str, Any]) -> tuple[list[str], list[list[str]]]:
    """(header, rows): what each method cost."""
    header = ["method", "training s", "of it shared", "training tokens", "of it shared", "bytes a user", "s an answer"]
    rows = [
        [
            method,
            _known(cost["train_seconds"], ",.0f"),
            _known(cost["shared_train_seconds"], ",.0f"),
            _known(cost["train_tokens"], ",d"),
            _known(cost["shared_train_tokens"], ",d"),
            _known(cost["bytes_per_user"], ",.0f"),
            _known(cost["predict_seconds"], ".4f"),
        ]
        for method, cost in report["costs"].items()
    ]
    return header, rows


COST_LINE = (
    "Seconds are of work: a second on two ranks counts twice, and actors' seconds are added up. Shared is what other"
    " methods of this report need, too. Bytes a user are what must be kept of a user with history to answer; "
    f"{UNKNOWN}: not known."
)


def prior_table(report: dict[str, Any]) -> tuple[list[str], list[list[str]]]:
    """(header, rows): what label priors are, and the nats a training question that they were learned by."""
    header = ["method", "task", "prior items", "weight", "questions", "nats without", "nats with", "shares alone"]
    names = ("prior_items", "weight", "nll_before", "nll_after", "nll_shares")
    rows = []
    for method, priors in report.get("priors", {}).items():
        for task, about in priors.items():
            items, weight, *nats = (f"{about[name]:.3g}" for name in names)
            rows.append([method, task, items, weight, str(about["num_questions"]), *nats])
    return header, rows


def grouping_table(report: dict[str, Any]) -> tuple[list[str], list[list[str]]]:
    """(header, rows): how well the experts found the true groups, where the data knows them."""
    header = ["method", "users", "true groups", "experts", "ARI, strongest expert", "ARI, clusters of gates", "NMI"]
    rows = [
        [
            method,
            *(str(found[count]) for count in ("num_users", "num_groups", "num_experts")),
            *(number(found[how]["adjusted_rand_index"]) for how in ("strongest", "k_means")),
            number(found["k_means"]["normalized_mutual_information"]),
        ]
        for method, found in report["grouping"].items()
    ]
    return header, rows


def published_table(report: dict[str, Any], task: str) -> tuple[list[str], list[list[str]]]:
    """(header, rows): figures that others published for this task; none for data that is not LaMP's own."""
    header = ["PUBLISHED, not ours", "metric", "value", "protocol", "base", "read in", "differs in"]
    rows = [
        [row["method"], row["metric"], f"{row['value']:g}", *(row[name] for name in ("protocol", "base", "source"))]
        for row in report["tasks"][task]["published"]
    ]
    differs = ["; ".join(row["differs"]) for row in report["tasks"][task]["published"]]
    return header, [[*row, text] for row, text in zip(rows, differs, strict=True)]


def protocol_lines(report: dict[str, Any]) -> list[str]:
    """What the figures are figures of, and what they cannot be compared with."""
    about = report["protocol"]
    lines = [
        f"Questions of split {about['split']}, {about['name']}"
        f" ({about['share_of_users_also_in_training']:.0%} of these users have questions in split"
        f" {about['train_split']}); seed {about['seed']}.",
        f"Base {about['base']}: {base_text(about)}, in {about['base_dtype']}.",
        f"Answers: {about['decoding']}.",
        f"Values are over questions; intervals are {about['confidence']:.0%} bootstrap intervals over users"
        f" ({about['num_bootstrap_samples']} samples); differences are paired, positive is better. They are not"
        f" corrected for the number of comparisons. Fewer than {MIN_USERS} users have no interval and no verdict.",
        f"Computed from the files in {report['predictions']['file']} under configuration {report['config_digest']};"
        " `proper-ds report verify` computes all scores again.",
    ]
    if report["test_reads"]:
        known = "as far as the ledgers in the run's folder, its study's and beside the data tell"
        lines.append(
            f"{report['test_reads']} configurations had read these test users by then, this one among them, {known}."
        )
    lines += [
        f"{', '.join(chosen['overrides'])} chosen on split {chosen['split']} by {chosen['num_trials']} trials of"
        f" {chosen['method']}, for {chosen['metric']}: {chosen['path']}."
        for chosen in report["chosen_by"]
    ]
    return lines + [f"Not comparable: {line}" for line in about["cautions"]]
