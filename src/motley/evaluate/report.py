"""The report of a run: one page to show around, complete in itself.

    journey.json (optional)   who, where, when, which stages, results       ─┐
    <stage>/metrics.jsonl     curves                                         ├─►  report.html
    <stage>/model/config.json the architecture, where no journey tells it   ─┘

Every part is optional; what a run does not have is named at the end instead of being guessed. The page holds
no scripts and asks no server for anything. All text from outside goes through `element`, which escapes it.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from motley.errors import InputError
from motley.evaluate.charts import interval_chart
from motley.evaluate.curves import ReportStage, stage_section
from motley.evaluate.islands import islands_section
from motley.evaluate.ranks import ranks_section
from motley.files import read_json, write_text
from motley.fleet import Machine, describe
from motley.model import ModelConfig
from motley.page import (
    Html,
    as_number,
    as_text,
    element,
    facts_table,
    figure,
    in_count,
    in_date,
    in_percent,
    in_time,
    in_whole,
    interval_95,
    list_section,
    whole_page,
)
from motley.plan import active_parameters, kv_cache_bytes_per_token, mtp_parameters, parameters
from motley.svg import tile
from motley.train.metrics import METRICS_FILE, read_metrics

JOURNEY_FILE = "journey.json"
MOST_SAMPLES = 24


def write_report(run: Path, out: Path) -> Path:
    """Write the page about the run folder `run` to the file `out`, and return its path.

    Args:
        run: the folder of a whole journey (with `journey.json`), of one stage (with `metrics.jsonl`), or a
            folder of such stages.
        out: the HTML file; it holds everything it shows.

    Raises:
        InputError: there is no such run, a file of it cannot be read, or `out` cannot be written.
    """
    run = Path(run)
    if not run.is_dir():
        raise InputError(f"{run} is not a folder; give the folder of a run, say runs/demo")
    journey = read_json(run / JOURNEY_FILE) if (run / JOURNEY_FILE).exists() else {}
    if not isinstance(journey, dict):
        raise InputError(f"{run / JOURNEY_FILE} holds no object; run `motley demo` again")
    stages = _stages(run, journey)
    if not journey and not stages:
        raise InputError(f"{run} holds neither {JOURNEY_FILE} nor a {METRICS_FILE}; give the folder of a run")
    write_text(Path(out), _page(run, journey, stages))
    return Path(out)


# ------------------------------------------------------------------------------------------- reading


def _stages(run: Path, journey: Mapping[str, Any]) -> list[ReportStage]:
    """The journey's stages; without a journey, the run itself or its folders that hold metrics."""
    listed = journey.get("stages")
    if not listed:
        folders = [run, *sorted(path for path in run.iterdir() if path.is_dir())]
        found = [folder for folder in folders if (folder / METRICS_FILE).exists()]
        found.sort(key=lambda folder: (folder / METRICS_FILE).stat().st_mtime)
        listed = [{"name": folder.name, "folder": str(folder.relative_to(run))} for folder in found]
    return [_stage(run, entry) for entry in listed]


def _stage(run: Path, entry: Mapping[str, Any]) -> ReportStage:
    name = str(entry.get("name", "stage"))
    folder = run / entry["folder"] if entry.get("folder") else None
    if folder is not None and not folder.resolve().is_relative_to(run.resolve()):
        raise InputError(f"{run / JOURNEY_FILE}: the folder of stage {name!r} lies outside the run")
    records: tuple[dict[str, Any], ...] = ()
    if folder is not None and (folder / METRICS_FILE).exists():
        records = tuple(read_metrics(folder))
    seconds = as_number(entry.get("seconds"))
    if seconds is None and records:
        seconds = as_number(records[-1].get("seconds"))
    return ReportStage(
        name=name,
        title=str(entry.get("title") or name.replace("_", " ").capitalize()),
        seconds=seconds,
        predicted_seconds=as_number(entry.get("predicted_seconds")),
        note=str(entry.get("note") or ""),
        folder=folder,
        records=records,
    )


def _model(journey: Mapping[str, Any], stages: Sequence[ReportStage]) -> dict[str, Any]:
    """The journey's model entry, or one made from the configuration the last stage left; counts filled in."""
    model = dict(journey.get("model") or {})
    if not model:
        for stage in reversed(stages):
            file = stage.folder / "model" / "config.json" if stage.folder else None
            if file and file.exists():
                model = {"config": read_json(file)}
                break
    if model.get("config"):
        config = ModelConfig.from_hf(model["config"])
        model.setdefault("parameters", parameters(config))
        model.setdefault("active_parameters", active_parameters(config))
        model.setdefault("kv_bytes_per_token", kv_cache_bytes_per_token(config))
        model["mtp_parameters"] = mtp_parameters(config)
    return model


# ------------------------------------------------------------------------------------------ the page


def _page(run: Path, journey: Mapping[str, Any], stages: Sequence[ReportStage]) -> str:
    model = _model(journey, stages)
    results = journey.get("results") or {}
    problems, text = results.get("problems") or {}, results.get("text") or {}
    name = str(model.get("name") or run.resolve().name)
    trained = [stage for stage in stages if stage.records]
    missing = _missing(journey, model, trained, problems, text)
    body = [
        _header(name, journey, model, stages, problems, text),
        _strip(stages),
        _model_card(model),
        _data(journey.get("data") or {}),
        *[
            section
            for stage in trained
            for section in (stage_section(stage), ranks_section(stage), islands_section(stage))
        ],
        _results(problems, text),
        _limits(model, trained, problems),
        list_section("Not in this report", missing),
        element("footer", "Written by motley from the files of this run. All curves: metrics.jsonl beside it."),
    ]
    return whole_page(f"{name}: report", body)


def _header(
    name: str,
    journey: Mapping[str, Any],
    model: Mapping[str, Any],
    stages: Sequence[ReportStage],
    problems: Mapping[str, Any],
    text: Mapping[str, Any],
) -> Html:
    lines = [element("p", "motley", class_="brand"), element("h1", name)]
    trained = [stage.title for stage in stages if stage.records]
    if trained:
        lines.append(element("p", f"Trained here: {', '.join(trained).lower()}."))
    if skill := journey.get("skill"):
        lines.append(element("p", f"What it learned, and no harder: {'; '.join(as_text(one) for one in skill)}."))
    if journey.get("machine"):
        lines.append(element("p", describe(Machine.from_dict(journey["machine"])), class_="muted"))
    if journey.get("started"):
        lines.append(element("p", f"Started {in_date(str(journey['started']))}.", class_="muted"))
    lines.append(element("div", *_tiles(model, stages, problems, text), class_="tiles"))
    return element("header", *lines)


def _tiles(
    model: Mapping[str, Any], stages: Sequence[ReportStage], problems: Mapping[str, Any], text: Mapping[str, Any]
) -> list[Html]:
    tiles = []
    accuracy = as_number(problems.get("accuracy"))
    if accuracy is not None:
        low, high = interval_95(problems)
        note = f"95 % interval {in_percent(low)} to {in_percent(high)}"
        tiles.append(tile("New problems answered right", in_percent(accuracy), note))
    bits = as_number(text.get("bits_per_byte"))
    if bits is None:  # not evaluated separately: the last validation says it too
        validations = [record for stage in stages for record in stage.of_kind("valid")]
        bits = next((b for r in reversed(validations) if (b := as_number(r.get("bits_per_byte"))) is not None), None)
    if bits is not None:
        tiles.append(tile("Held-out text", f"{bits:.3f}", "bits per byte; less is better"))
    if (total := as_number(model.get("parameters"))) is not None:
        active = as_number(model.get("active_parameters"))
        tiles.append(tile("Parameters", in_count(total), f"{in_count(active)} active per token" if active else ""))
    tokens = sum(as_number(stage.records[-1].get("tokens")) or 0 for stage in stages if stage.records)
    if tokens:
        tiles.append(
            tile(
                "Trained on",
                in_count(tokens),
                "tokens" + (", all stages together" if len(stages) > 1 else ""),
            )
        )
    seconds = sum(stage.seconds or 0 for stage in stages)
    if seconds:
        predicted = sum(stage.predicted_seconds or 0 for stage in stages)
        note = f"predicted {in_time(predicted)}" if predicted else ""
        tiles.append(tile("Wall time", in_time(seconds), note))
    return tiles


def _strip(stages: Sequence[ReportStage]) -> Html:
    """The journey, stage by stage: how long each took, and how long it was thought to take."""
    timed = [stage for stage in stages if stage.seconds is not None or stage.predicted_seconds is not None]
    if len(timed) < 2:
        return Html("")  # one stage is no journey, and its time is already told
    longest = max(max(stage.seconds or 0, stage.predicted_seconds or 0) for stage in timed) or 1
    cards = []
    for stage in timed:
        parts = [element("div", stage.title, class_="title")]
        if stage.seconds is not None:
            parts.append(element("div", in_time(stage.seconds), class_="time"))
            parts.append(_bar("actual", stage.seconds / longest))
        if stage.predicted_seconds is not None:
            parts.append(_bar("predicted", stage.predicted_seconds / longest))
            parts.append(element("div", f"predicted {in_time(stage.predicted_seconds)}", class_="note"))
        if stage.note:
            parts.append(element("div", stage.note, class_="note"))
        cards.append(element("div", *parts, class_="stage"))
    lines = [element("h2", "The journey"), element("div", *cards, class_="strip")]
    both = [
        (s.seconds, s.predicted_seconds) for s in timed if s.seconds is not None and s.predicted_seconds is not None
    ]
    actual, predicted = sum(pair[0] for pair in both), sum(pair[1] for pair in both)
    if predicted:
        which = "All stages" if len(both) == len(timed) else f"The {len(both)} stages with a prediction"
        deviation = 100 * (actual - predicted) / predicted
        sentence = f"{which}: {in_time(actual)}, predicted {in_time(predicted)} ({deviation:+.0f} %)."
        lines.append(element("p", sentence, class_="muted"))
    return element("section", *lines)


def _bar(kind: str, share: float) -> Html:
    return element("div", class_=f"bar {kind}", style=f"width: {100 * share:.1f}%")


def _model_card(model: Mapping[str, Any]) -> Html:
    if not model:
        return Html("")
    counts = [
        ("Parameters", in_whole(model.get("parameters"))),
        ("Active per token", in_whole(model.get("active_parameters"))),
        ("In MTP modules, besides", in_whole(model.get("mtp_parameters") or None)),
        ("Bytes of cache per token (bf16)", in_whole(model.get("kv_bytes_per_token"))),
    ]
    shape: list[tuple[str, str | None]] = []
    if model.get("config"):
        config = ModelConfig.from_hf(model["config"])
        moe_layers = sum(config.is_moe_layer(layer) for layer in range(config.num_hidden_layers))
        query = str(config.q_lora_rank) if config.q_lora_rank else "not compressed"
        heads = f"{config.qk_nope_head_dim} + {config.qk_rope_head_dim} rotary, values {config.v_head_dim}"
        experts = None
        if moe_layers:
            chosen = f"{config.num_experts_per_tok} of {config.n_routed_experts} routed"
            shared = f" + {config.n_shared_experts} shared" if config.n_shared_experts else ""
            experts = f"{chosen}{shared}, inner width {config.moe_intermediate_size}"
        counts += [
            ("Vocabulary", f"{config.vocab_size:,} tokens"),
            ("Longest context", f"{config.max_position_embeddings:,} tokens"),
        ]
        shape = [
            ("Architecture", config.model_type.replace("deepseek_v", "DeepSeek-V")),
            ("Layers", f"{config.num_hidden_layers}, of which {moe_layers} with experts"),
            ("Hidden width", f"{config.hidden_size:,}"),
            ("Attention heads", f"{config.num_attention_heads}, width {heads}"),
            ("Latent width", f"{config.kv_lora_rank}; queries {query}"),
            ("Experts per token", experts),
            ("MTP modules", str(config.num_nextn_predict_layers)),
        ]
    return element(
        "section",
        element("h2", "The model"),
        element("div", facts_table(counts), facts_table(shape), class_="columns"),
    )


def _data(data: Mapping[str, Any]) -> Html:
    """Statistics of the prepared data, as `data.json` has them."""
    if not data:
        return Html("")
    names = {"vocab_size": "Vocabulary", "seq_len": "Tokens per row"}
    facts = [
        (names.get(key, key.replace("_", " ").capitalize()), as_text(value))
        for key, value in data.items()
        if key not in ("format", "pad_id", "summary", "fingerprint")
        and isinstance(value, str | int | float)
        and not isinstance(value, bool)
    ]
    splits = {name: data[name] for name in ("train", "valid") if isinstance(data.get(name), dict)}
    lines = [element("h2", "The data")]
    if data.get("summary"):
        lines.append(element("p", str(data["summary"])))
    if splits:
        columns = list(dict.fromkeys(key for split in splits.values() for key in split))
        columns = [key for key in columns if any(split.get(key) for split in splits.values())]
        heads = [
            element("th", ""),
            *[element("th", key.replace("_", " "), class_="number") for key in columns],
        ]
        rows = [
            element(
                "tr",
                element("td", name),
                *[element("td", as_text(split.get(key, "")), class_="number") for key in columns],
            )
            for name, split in splits.items()
        ]
        lines.append(element("table", element("tr", *heads), *rows))
        tokens = sum(as_number(split.get("tokens")) or 0 for split in splits.values())
        size = sum(as_number(split.get("bytes")) or 0 for split in splits.values())
        if tokens and size:
            facts.append(("Bytes per token", f"{size / tokens:.2f}"))
    half = (len(facts) + 1) // 2
    lines.append(element("div", facts_table(facts[:half]), facts_table(facts[half:]), class_="columns"))
    return element("section", *lines)


# ------------------------------------------------------------------------------------------- results


def _results(problems: Mapping[str, Any], text: Mapping[str, Any]) -> Html:
    if not problems and not text:
        return Html("")
    lines = [element("h2", "Results")]
    if problems:
        lines += _accuracy(problems)
    if text:
        facts = [
            (key.replace("_", " ").capitalize(), as_text(value))
            for key, value in text.items()
            if as_number(value) is not None or isinstance(value, str)
        ]
        lines += [element("h3", "Held-out text"), facts_table(facts)]
    samples = problems.get("samples") or []
    if samples:
        shown = samples[:MOST_SAMPLES]
        lines.append(element("h3", "Transcripts"))
        lines.append(element("p", f"{len(shown)} answers as given, right and wrong ones.", class_="muted"))
        lines += [_transcript(sample) for sample in shown]
    return element("section", *lines)


def _accuracy(problems: Mapping[str, Any]) -> list[Html]:
    """Chart and table of the share of problems answered right, per family."""
    families = {
        name: family
        for name, family in (problems.get("families") or {}).items()
        if as_number(family.get("accuracy")) is not None
    }
    lines = [element("h3", "New problems answered right")]
    accuracy, error = as_number(problems.get("accuracy")), as_number(problems.get("standard_error"))
    if accuracy is not None:
        low, high = interval_95(problems)
        sentence = f"{100 * accuracy:.1f} % right, 95 % interval {100 * low:.1f} to {100 * high:.1f} %"
        if error is not None:
            sentence += f" (standard error {100 * error:.1f} points)"
        if (count := as_number(problems.get("count"))) is not None:
            sentence += f", {count:,.0f} problems"
        if (cut := as_number(problems.get("truncated_share"))) is not None:
            sentence += f"; {100 * cut:.1f} % of the answers were cut off at the length limit and count as wrong"
        lines.append(element("p", f"{sentence}."))
    if not families:
        return lines
    ordered = sorted(families, key=lambda name: -families[name]["accuracy"])
    chart = interval_chart(
        [name.replace("_", " ") for name in ordered],
        [families[name]["accuracy"] for name in ordered],
        [interval_95(families[name]) for name in ordered],
        "% right; the whiskers are 95 % intervals",
    )
    return [*lines, figure("By family of problems", chart)]


def _transcript(sample: Mapping[str, Any]) -> Html:
    right = bool(sample.get("correct"))
    verdict = element("span", "right" if right else "wrong", class_="right" if right else "wrong")
    question = str(sample.get("question", ""))
    first_line = question.strip().partition("\n")[0][:110]
    family = str(sample.get("family", "")).replace("_", " ")
    parts: list[Html] = []
    for label, key in (("Question", "question"), ("Thinking", "thinking"), ("Answer", "answer")):
        if sample.get(key):
            parts += [element("div", label, class_="label"), element("pre", str(sample[key]))]
    if not right and sample.get("expected") is not None:
        parts += [element("div", "Expected", class_="label"), element("pre", str(sample["expected"]))]
    summary = element("summary", verdict, f" · {family} ", element("span", first_line, class_="question"))
    return element("details", summary, *parts)


def _limits(model: Mapping[str, Any], trained: Sequence[ReportStage], problems: Mapping[str, Any]) -> Html:
    """Limits of the results that a reader must know, derived from the numbers."""
    limits = []
    total = as_number(model.get("parameters"))
    if total is not None and total < 1e9:
        limits.append(
            f"With {in_count(total)} parameters this is a small model: it knows little of the world and does "
            "not hold a conversation. Expect sense only on the kinds of tasks it was trained for."
        )
    families = problems.get("families") or {}
    if families:
        names = ", ".join(sorted(name.replace("_", " ") for name in families))
        limits.append(
            f"The accuracy is for problems made by the same generators as the training problems ({names}), "
            "at the same difficulty, freshly drawn. It says nothing about other tasks or harder ones."
        )
    weak = [
        name.replace("_", " ")
        for name, family in families.items()
        if (value := as_number(family.get("accuracy"))) is not None and value < 0.5
    ]
    if weak:
        limits.append(f"More often wrong than right: {', '.join(sorted(weak))}.")
    skipped = sum("skipped" in str(event.get("message", "")) for stage in trained for event in stage.of_kind("event"))
    if skipped:
        limits.append(f"{skipped} training step{'s were' if skipped > 1 else ' was'} skipped.")
    return list_section("What to keep in mind", limits)


def _missing(
    journey: Mapping[str, Any],
    model: Mapping[str, Any],
    trained: Sequence[ReportStage],
    problems: Mapping[str, Any],
    text: Mapping[str, Any],
) -> list[str]:
    """Parts of a full report that this run has no data for."""
    checks = {
        "the machine (no journey.json with one)": journey.get("machine"),
        "when it was started": journey.get("started"),
        "the model's architecture": model.get("config"),
        "statistics of the data": journey.get("data"),
        "training curves: no stage left a metrics.jsonl": trained,
        "accuracy on problems: not evaluated": problems,
        "bits per byte of held-out text: not evaluated separately": text,
    }
    return [name for name, there in checks.items() if not there]
