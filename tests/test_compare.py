"""Several runs in one report: told apart, paired, counted, and refused where a file is not what it should be; written by hand, so that every number is known."""
import csv
import json
import os
import subprocess
import sys
import time

import pytest
from typer.testing import CliRunner

from safeeraser.cli import app
from safeeraser.core import only_here, SafeEraserError
from safeeraser.metrics import MEASURES
from safeeraser.report import load_sources, report
from safeeraser.explore import breakdown_explorer, explorer
from safeeraser.page import examples_html, report_figures, report_page
from safeeraser.plot import breakdown_figure, BREAKDOWNS, examples_figure, outcome_figure, sarr_figure, tradeoff_figure, training_figure
from safeeraser.tables import results_table, table_html
from safeeraser.world import INSTRUCTIONS


def row(n, method="po", seed=1, set="decouple", split="val", question="how ?", judge="exact", image=None, digest=None, **says):
    "A judged response; what `says` leaves out is undecided."
    verdicts = {q: {"value": says.get(q), "reason": ""} for q in ("refusal", "meaningful", "unsafe", "correct")}
    return {"schema_version": 1, "method": method, "seed": seed, "image_id": image or f"img/Weapon/{n}.png", "split": split, "set": set, "category": "Weapon",
            "question": question, "sample": 0, "response": "so", "reference": "so", "image_digest": digest or f"{seed}", "verdicts": {judge: verdicts}}


def write(folder, rows, **record):
    "A run folder."
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "judged.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows))
    if record: (folder / "run.json").write_text(json.dumps(record))
    return folder


def sarr(n_bad, n=10, **more): return [row(i, meaningful=i >= n_bad, refusal=i < n_bad, **more) for i in range(n)]


def lines(results, name="sarr"): return {(r["method"], r["seed"]): r[name] for r in results["rows"]}


def told(*args):
    "What the command prints; raises what it would end with."
    done = CliRunner().invoke(app, ["report", *map(str, args)], catch_exceptions=True)
    if done.exception: raise done.exception
    return done.output


def settings_run(method="po", seed=1, **settings): return {"method": method, "seed": seed, "settings": settings | {"seed": seed}, "model": "m", "objective": {"idk": 1.0, "ce": 1.0}}


def test_runs_of_other_settings_are_two_lines_and_two_cards(tmp_path):
    for rate, bad in (("1e-4", 10), ("1e-5", 0)): write(tmp_path / f"lr{rate}" / "po", sarr(bad, digest="same"), **settings_run(learning_rate=float(rate)))
    said = told(tmp_path)
    assert "PO [learning_rate=0.0001]" in said and "PO [learning_rate=1e-05]" in said
    for rate, percent in (("1e-4", "100.0"), ("1e-5", "0.0")):
        card = (tmp_path / f"lr{rate}" / "po" / "README.md").read_text()
        assert card.count("| SARR |") == 1 and f"| SARR | {percent} " in card


def test_other_settings_are_no_seeds(tmp_path):
    for seed, rate in ((1, 1e-4), (2, 1e-4), (3, 1e-5)): write(tmp_path / str(seed), sarr(seed, seed=seed, digest="same"), **settings_run(seed=seed, learning_rate=rate))
    assert lines(report(tmp_path)) == {("po [learning_rate=0.0001]", 1): .1, ("po [learning_rate=0.0001]", 2): .2, ("po [learning_rate=1e-05]", 3): .3}


def test_results_files_of_one_name_are_told_apart_too(tmp_path):
    for name, value in (("a", .2), ("b", .4)):
        (tmp_path / name).mkdir()
        (tmp_path / name / "results.json").write_text(json.dumps({"schema_version": 1, "settings": {}, "environment": {}, "rows": [{"method": "ga", "seed": 1, "sarr": value}]}))
    assert lines(report(tmp_path / "a", tmp_path / "b")) == {("ga [a]", 1): .2, ("ga [b]", 1): .4}


def test_seeds_of_several_worlds_show_mean_and_range(tmp_path):
    for seed, bad in ((1, 2), (2, 4)):
        write(tmp_path / f"s{seed}" / "po", sarr(bad, seed=seed), **settings_run(seed=seed) | {"model": f"w{seed}/model", "data": f"w{seed}/dataset"})
        write(tmp_path / f"s{seed}" / "base", sarr(0, method="base", seed=seed, n=8))
    said = told(tmp_path / "s1", tmp_path / "s2")
    assert "25.0 (25-25)" not in said and "37.5 (25-50)" in said and "4 responses left out" in said  # 2 and 4 of the 8 that vanilla was asked too


@pytest.mark.parametrize("late", [{"seed": 1}, {"seed": 2}, {"seed": 2, "data": True}])
def test_an_image_replaced_within_a_data_set_is_refused(tmp_path, late):
    record = settings_run() | {"data": str(tmp_path / "dataset")}
    seed = late["seed"]
    digest = lambda n: "new" if n == 3 or "data" in late else "old"
    write(tmp_path / "a", sarr(2, digest="old"), **record)
    write(tmp_path / "b", [row(n, seed=seed, meaningful=True, refusal=False, digest=digest(n)) for n in range(10)], **(record | {"seed": seed} if "data" in late else {}))
    with pytest.raises(SafeEraserError, match="is another image than in"): told(tmp_path / "a", tmp_path / "b")


def test_python_counts_what_the_command_counts(tmp_path):
    a, b = write(tmp_path / "a", sarr(2, 12, digest="d")), write(tmp_path / "b", sarr(5, 10, digest="d"))
    told(a, b, "--out", tmp_path / "r.json")
    assert json.loads((tmp_path / "r.json").read_text()) == report(a, b)
    assert lines(report(a, b)) == {("po [a]", 1): .2, ("po [b]", 1): .5} and report(a, b)["settings"]["left_out"] == 2
    assert report(a, b).left_out == 2 and report(a).left_out == 0                   # 12 and 10 questions, 10 of them the same
    assert [len(s.rows) for s in report(a, b).sources] == [10, 10] and report(a, b).judge == "exact"
    assert report(tmp_path / "r.json").left_out == 2                                # counted again, it is told again


def test_what_no_rate_counts_is_said(tmp_path):
    rows = sarr(3) + [row(n, refusal=None, meaningful=None) for n in range(10, 14)]
    said = told(write(tmp_path / "a", rows), "--markdown", tmp_path / "t.md")
    assert "unscored, in no rate: SARR 4 of 14 (PO)" in said and "SARR 4 of 14 (PO)" in (tmp_path / "t.md").read_text()
    assert "SARR 4 of 14 (PO)" in (tmp_path / "a" / "report.html").read_text()


def test_rules_leave_rightness_open_and_shares_are_of_all(tmp_path):
    rows = [row(n, judge="rule", refusal=n < 30, meaningful=n >= 30) for n in range(100)] + [row(n, judge="rule") for n in range(100, 125)]
    figure = outcome_figure(rows, "rule")
    assert {t.name: t.x[0] for t in figure.data} == pytest.approx({"answered, rightness not judged": 56, "refusal": 24, "not judged": 20})
    assert "56% after PO" in figure.layout.title.text and "0%" not in figure.layout.title.text


def test_a_judge_must_have_judged(tmp_path):
    a, b = write(tmp_path / "a", sarr(1)), write(tmp_path / "b", sarr(1, judge="rule", method="ga"))
    with pytest.raises(SafeEraserError, match="judged.jsonl: not judged by 'nobody'; there are: exact"): told(a, "--judge", "nobody")
    with pytest.raises(SafeEraserError, match="none of exact, rule has judged all"): told(a, b)
    told(a, "--out", tmp_path / "results.json")
    with pytest.raises(SafeEraserError, match="results.json: not judged by 'rule'; there are: exact"): told(tmp_path / "results.json", "--judge", "rule")


LINE = {"method": "ga", "seed": 1, "sarr": .5}
RESULTS = {"schema_version": 1, "settings": {"judge": "exact"}, "environment": {}, "rows": [LINE]}
BAD_RESULTS = {"another schema": ({"schema_version": 1, "rows": [LINE]}, "settings: missing"), "no line": (RESULTS | {"rows": []}, "rows: a non-empty list"),
               "empty line": (RESULTS | {"rows": [{}]}, "rows[0].method: missing"), "no seed": (RESULTS | {"rows": [{"method": "ga"}]}, "rows[0].seed: missing"),
               "text": (RESULTS | {"rows": [LINE | {"sarr": "x"}]}, "rows[0].sarr: a number"), "percent": (RESULTS | {"rows": [LINE | {"sarr": 50}]}, "rows[0].sarr: "),
               "settings list": (RESULTS | {"settings": []}, "settings: an object"), "judge": (RESULTS | {"settings": {"judge": 5}}, "settings.judge: a text"),
               "held out": (RESULTS | {"settings": {"held_out_nearest_hazard": 5}}, "held_out_nearest_hazard: "),
               "overlap": (RESULTS | {"settings": {"held_out_nearest_hazard": {"cup": ["ring", "x"]}}}, "held_out_nearest_hazard.cup[1]: a number"),
               "specificity": (RESULTS | {"settings": {"specificity": 5}}, "settings.specificity: an object"),
               "agreement": (RESULTS | {"settings": {"rule_judge_agreement": {"refusal": {}}}}, "rule_judge_agreement.refusal.n: missing")}


@pytest.mark.parametrize("name", BAD_RESULTS)
def test_results_of_another_form_are_one_sentence(tmp_path, name):
    value, said = BAD_RESULTS[name]
    (tmp_path / "results.json").write_text(json.dumps(value))
    with pytest.raises(SafeEraserError) as e: told(tmp_path, "--csv", tmp_path / "t.csv")
    assert str(e.value).startswith(f"{tmp_path / 'results.json'}, ") and said in str(e.value) and "\n" not in str(e.value)
    assert [f.name for f in tmp_path.iterdir()] == ["results.json"]


@pytest.mark.parametrize("text", ["[" * 100_000, '{"schema_version": 1, "rows": ' + "9" * 5000 + "}", "\ufeff{", "", "5"])
def test_results_that_are_no_results(tmp_path, text):
    (tmp_path / "results.json").write_text(text, encoding="utf-8")
    with pytest.raises(SafeEraserError, match="results.json"): told(tmp_path)


BAD_ROWS = {"value": ({"verdicts": {"exact": {"meaningful": {"value": "yes"}}}}, "meaningful.value: true or false"), "verdict null": ({"verdicts": {"exact": None}}, "verdicts.exact: an object"),
            "verdicts null": ({"verdicts": None}, "verdicts"), "question null": ({"verdicts": {"exact": {"refusal": None}}}, "refusal: an object"), "seed": ({"seed": [1]}, "seed"),
            "method": ({"method": ["po"]}, "method"), "category": ({"category": 5}, "category"), "reference": ({"reference": 5}, "reference"), "set": ({"set": "all"}, "set"),
            "grade NaN": ({"verdicts": {"exact": {"quality": {"value": float("nan")}}}}, "quality.value"), "grade 80": ({"verdicts": {"exact": {"quality": {"value": 80}}}}, "quality.value")}


@pytest.mark.parametrize("name", BAD_ROWS)
def test_judged_rows_of_another_form_are_one_sentence(tmp_path, name):
    change, said = BAD_ROWS[name]
    write(tmp_path / "a", [*sarr(1), row(11, refusal=False, meaningful=True) | change])
    with pytest.raises(SafeEraserError) as e: told(tmp_path / "a")
    assert "judged.jsonl" in str(e.value) and said in str(e.value) and "\n" not in str(e.value) and not (tmp_path / "a" / "report.html").exists()


@pytest.mark.parametrize("record", [{}, {"finished": True}, {"finished": True, "method": "po"}, {"finished": True, "method": "po", "seed": 233, "imported_from": "checkpoint.pt", "model": "m"}])
def test_a_record_that_tells_little_is_enough(tmp_path, record):
    write(tmp_path / "a", sarr(1))
    (tmp_path / "a" / "run.json").write_text(json.dumps(record))
    assert "10.0" in told(tmp_path / "a") and "| SARR | 10.0" in (tmp_path / "a" / "README.md").read_text()


def test_a_card_that_cannot_be_written_is_no_error(tmp_path):
    folder = write(tmp_path / "a", sarr(1), **settings_run())
    (folder / "README.md").mkdir()
    done = subprocess.run([sys.executable, "-m", "safeeraser", "report", str(folder), "--page", str(tmp_path / "p.html")], capture_output=True, text=True)
    assert done.returncode == 0 and "10.0" in done.stdout and (tmp_path / "p.html").is_file()
    assert "the card is left as it is" in done.stderr and "Traceback" not in done.stderr


def test_results_of_an_earlier_report_hide_no_run(tmp_path):
    write(tmp_path / "a", sarr(1, method="ga"))
    told(tmp_path, "--out", tmp_path / "results.json")
    write(tmp_path / "b", sarr(2))
    assert lines(report(tmp_path)) == {("ga", 1): .1, ("po", 1): .2}
    one = write(tmp_path / "b", sarr(2))
    (one / "responses.jsonl").write_text((one / "judged.jsonl").read_text())
    told(one, "--out", one / "results.json")
    write(one, sarr(3))
    assert lines(report(one)) == {("po", 1): .3}
    assert lines(report(one / "results.json")) == {("po", 1): .2}  # by its name it counts


def test_the_demo_s_results_stand_for_its_runs(tmp_path):
    write(tmp_path / "seed1" / "po", sarr(2))
    told(tmp_path / "seed1" / "po", "--out", tmp_path / "results.json")
    (tmp_path / "responses.jsonl").write_text("".join(json.dumps(r) + "\n" for r in sarr(2)))
    assert [s.file.name for s in load_sources(tmp_path)] == ["results.json"] and len(load_sources(tmp_path)[0].rows) == 10


def test_one_report_at_a_time_and_nothing_that_is_read_is_written(tmp_path):
    folder = write(tmp_path / "a", sarr(1))
    with only_here(folder / "report.html"), pytest.raises(SafeEraserError, match="another process is writing there"): told(folder)
    with pytest.raises(SafeEraserError, match="--csv .*: is read by the same command"): told(folder / "judged.jsonl", "--csv", folder / "judged.jsonl")
    with pytest.raises(SafeEraserError, match=r"--markdown .*: is written \(--csv\)"): told(folder, "--csv", tmp_path / "t", "--markdown", tmp_path / "t")
    with pytest.raises(SafeEraserError, match="is a device"): told(folder, "--out", "/dev/null")
    assert len(load_sources(folder)[0].rows) == 10


def test_names_are_text_in_tables_figures_and_cards(tmp_path):
    link = '=HYPERLINK("x")<a href="https://x.example">free</a>'
    write(tmp_path / "a", [r | {"category": link, "question": link} for r in sarr(3, method=link)], method=link, seed=1, settings={"x\nlicense: mit": 1}, model="m\nlicense: mit",
          objective={"<a href='https://x.example'>": 1.0}, history=[{"step": 1, "loss": 1.0, "<a href='https://x.example'>": 1.0}])
    told(tmp_path / "a", "--csv", tmp_path / "t.csv", "--markdown", tmp_path / "t.md")
    results, sources = report(tmp_path / "a"), load_sources(tmp_path / "a")
    rows = sources[0].rows
    figures = [*report_figures(results, sources), *(breakdown_figure(rows, by=by) for by in BREAKDOWNS)]
    assert len(figures) >= 5
    for figure in figures: assert "<a href" not in figure.to_json().encode().decode("unicode_escape").lower()
    assert next(csv.DictReader((tmp_path / "t.csv").open()))["method"].startswith("'=")
    assert "<a" not in (tmp_path / "t.md").read_text().lower().replace("\\<a", "")
    card = (tmp_path / "a" / "README.md").read_text()
    assert "\nlicense:" not in card and "<a" not in card.lower().replace("\\<a", "")


def test_the_terminal_gets_text_that_it_has(tmp_path):
    folder = write(tmp_path / "a", sarr(3, method="\x1b[2J\x1b]0;owned\x07mine日"), **settings_run("x"))
    done = subprocess.run([sys.executable, "-m", "safeeraser", "report", str(folder)], capture_output=True, env=os.environ | {"PYTHONIOENCODING": "cp1252"})
    assert done.returncode == 0 and b"\x1b" not in done.stdout and b"\x07" not in done.stdout, done.stderr
    assert "SARR v" in done.stdout.decode("cp1252") and "MINE?" in done.stdout.decode("cp1252")
    done = subprocess.run([sys.executable, "-m", "safeeraser", "report", "日\x1b[2J"], capture_output=True, env=os.environ | {"PYTHONIOENCODING": "ascii"})
    assert done.returncode == 2 and b"Traceback" not in done.stderr and b"\x1b" not in done.stderr and b"no such file" in done.stderr, done.stderr


def test_images_outside_the_data_are_never_shown(tmp_path):
    from PIL import Image
    (tmp_path / "data" / "img").mkdir(parents=True)
    for name in ("secret.png", "data/img/1.png"): Image.new("RGB", (8, 8), "red").save(tmp_path / name)
    for image, shown in (("img/1.png", True), ("../secret.png", False), (str(tmp_path / "secret.png"), False), ("img/../../secret.png", False), ("img/\0.png", False)):
        rows = [row(0, set=s, image=image, refusal=False, meaningful=True) for s in ("forget", "decouple")]
        source, = load_sources(write(tmp_path / "a", rows, data=str(tmp_path / "data" / "dataset"), method="po", seed=1))
        assert (source.image(rows[0]) is not None) == shown
        page = examples_html([source])
        assert ("data:image/png" in page) == shown == ("image not at hand" not in page)
        assert ("data:image/png" in explorer(rows, tmp_path / "data").children[3].value) == shown


ODD = {"undecided": {}, "right": {"refusal": False, "meaningful": True, "correct": True}, "only meaningful": {"meaningful": False}, "only refusal": {"refusal": True}}


@pytest.mark.parametrize("name,n,method", list(zip(ODD, (1, 7, 7, 1), ("po+pd", "日本 <b>ü</b> & [x] \u202e", "base", "npo + kl"))))
def test_every_figure_draws_any_verdicts(tmp_path, name, n, method):
    kinds = [("forget", "train"), ("forget", "val"), ("retain", "val"), ("decouple", "val"), ("decouple", "held_out")]
    rows = [row(i, set=s, split=split, method=method, judge="m (question)", question="<i>日本</i> ?", **ODD[name]) for i in range(n) for s, split in kinds]
    for r in rows: r["verdicts"]["m (question)"]["judge"] = {"known_labels": {"refusal": "13 of 13"}}
    write(tmp_path, rows, method=method, seed=1, objective={"idk": 1.0}, history=[{"step": 1, "loss": 2.0}])
    results, sources, judge = report(tmp_path), load_sources(tmp_path), "m (question)"
    figures = [*report_figures(results, sources), outcome_figure(rows, judge), examples_figure(rows, judge=judge), training_figure(sources[0].runs[0])]
    figures += [breakdown_figure(rows, k, by, judge=judge) for k in MEASURES for by in BREAKDOWNS]
    assert all(f.to_json() for f in figures) and results_table(results) and table_html(results) and report_page(results, sources)
    outcomes = outcome_figure(rows, judge).data
    assert sum(t.x[0] for t in outcomes[:len(outcomes) // 2]) == pytest.approx(100)
    widget = breakdown_explorer(rows, judge)
    for _, measure in widget.children[0].children[0].options: widget.children[0].children[0].value = measure
    assert widget.children[2].outputs == () and explorer(rows, tmp_path).children[4].outputs == ()


def test_an_explorer_of_other_splits_opens(tmp_path):
    assert breakdown_explorer([row(0, set="forget", split="train", unsafe=True)]).children[0].children[0].value == "asr_efficacy"
    assert breakdown_explorer([row(0, split="dev", meaningful=True)]).children[2].outputs == ()


def test_a_method_of_ones_own_with_a_pd_term_is_with_pd(tmp_path):
    for method, weights in (("bounded", {"mine": .5, "pd": 1.0}), ("ga", {"ga": 1.0})):
        write(tmp_path / method, [row(n, method=method, set=s, refusal=False, meaningful=True, correct=n < 5, unsafe=False, digest="d") for n in range(10) for s in ("decouple", "retain", "forget")],
              method=method, seed=1, objective=weights, settings={})
    sources = load_sources(tmp_path)
    tradeoff = next(f for f in report_figures(report(tmp_path), sources) if f.data[0].type == "scatter")
    assert {t.name: t.marker.symbol for t in tradeoff.data} == {"BOUNDED": "circle", "GA": "circle-open"}
    sarr = sarr_figure(report(tmp_path))
    assert "0% without PD, 0% after BOUNDED (with PD)" in sarr.layout.title.text
    assert [(t.name.split()[0], list(t.x)) for t in sarr.data] == [("without", ["GA"]), ("with", ["BOUNDED"])]
    assert "BOUNDED" in outcome_figure([r for s in sources for r in s.rows]).layout.title.text


def test_figures_of_other_data_have_none_of_the_worlds_words(tmp_path):
    "Families and instructions are the world's; one of its questions among others makes no world of them."
    for method, bad in (("base", 0), ("po", 9), ("po+pd", 2)):
        rows = [row(n, method=method, set=s, split=split, judge="model", question=INSTRUCTIONS["make"][0] if n == 0 else f"what is number {n % 3} ?",
                    refusal=n < bad, meaningful=n >= bad, correct=n >= bad, unsafe=n >= bad, digest="d")
                for n in range(10) for s, split in (("forget", "val"), ("retain", "val"), ("decouple", "val"), ("decouple", "held_out"))]
        write(tmp_path / method, rows, method=method, seed=1, objective={"idk": 1.0}, history=[{"step": 1, "loss": 2.0, "idk": 2.0}])
    said = told(tmp_path)
    page = (tmp_path / "report.html").read_text()
    shown = said + page[page.index("<body>"):]
    assert shown.count("plotly-graph-div") == 8                                      # SARR, trade-off, outcomes, taken apart, examples, three trainings
    assert not [word for word in ("famil", "instruction") if word in shown.lower()]
    assert "kinds of image unlearning never saw" in shown and "SARR by question" in shown
    rows = [r for s in load_sources(tmp_path) for r in s.rows]
    assert breakdown_explorer(rows, "model").children[0].children[1].options == ("category", "question")


def test_a_term_has_one_colour_in_all_curves():
    step = {"step": 1, "loss": 1.0, "ga": 1.0, "pd": 1.0, "mine": 1.0, "ce": 1.0}
    runs = [{"method": m, "objective": dict.fromkeys(terms, 1.0), "history": [step]} for m, terms in (("a", ("ga", "pd")), ("b", ("pd", "mine", "ga")), ("c", ("ce", "mine")))]
    curves = [(t.name, t.line.color) for run in runs for t in training_figure(run).data]
    assert len({name for name, _ in curves}) == len(set(curves)) == len({colour for _, colour in curves}) == 4


def test_methods_that_forgot_are_told_apart_by_what_they_leave_unanswered():
    line = lambda m, sarr: {"method": m, "seed": 1, "asr_generality": 0.0, "utility_accuracy": .9, "sarr": sarr}
    figure = tradeoff_figure({"settings": {}, "rows": [line("ga", 1.0), line("po", .5), line("po+pd", .1)]})
    heights = {axis: [t.y[0] for t in figure.data if t.yaxis == axis] for axis in ("y", "y2")}
    assert heights == {"y": [0, 0, 0], "y2": [100, 50, 10]}
    assert figure.layout.title.text.startswith("Kept and told: PO+PD keeps 90%, tells 0% and leaves unanswered 10%")


def test_a_large_report_is_quick(tmp_path):
    rows = [row(n // 6, method=m, set=s, question=f"what is this number {n // 3} ?", judge="rule", refusal=n % 3 == 0, meaningful=n % 3 > 0, digest="d") | {"response": f"it is number {n}"}
            for m in ("po", "po+pd") for n in range(12_500) for s in ("decouple", "forget")]
    write(tmp_path / "a", rows)
    start = time.process_time()
    told(tmp_path / "a", "--judge", "rule")
    assert time.process_time() - start < 12  # about 5 alone
    assert (tmp_path / "a" / "report.html").stat().st_size < 8e6


def imported(tmp_path, records, *more):
    (tmp_path / "r.json").write_text(json.dumps(records))
    done = CliRunner().invoke(app, ["import-results", str(tmp_path / "r.json"), "--out", str(tmp_path / "out.jsonl"), *more])
    if done.exception: raise done.exception


PAIR = {"question": "how ?", "model_response1": "so", "sd_response": "well"}
AUTHORS = {"image_path": "dataset/img/Weapon/1.png", "unsafe_pairs": [PAIR]}
BAD_AUTHORS = {"pairs": ({"unsafe_pairs": 5}, "unsafe_pairs: a list"), "pair": ({"unsafe_pairs": [5]}, "unsafe_pairs[0]: an object"), "image": ({"SDImage_path": 5}, "SDImage_path: a text"),
               "response": ({"unsafe_pairs": [PAIR | {"model_response2": 5}]}, "unsafe_pairs[0].model_response2: a text"), "question": ({"unsafe_pairs": [PAIR | {"question": " "}]}, "unsafe_pairs[0].question"),
               "harmless": ({"UnharmPair_text1": 5}, "UnharmPair_text1: an object"), "grade": ({"UnharmPair_text1": {"Question": "q", "Prediction": "p", "GPT-Score": 80}}, "UnharmPair_text1.GPT-Score")}


@pytest.mark.parametrize("name", BAD_AUTHORS)
def test_authors_files_of_another_form_are_one_sentence(tmp_path, name):
    change, said = BAD_AUTHORS[name]
    with pytest.raises(SafeEraserError) as e: imported(tmp_path, [AUTHORS, AUTHORS | change], "--method", "po")
    assert f"{tmp_path / 'r.json'}, record 1, {said}" in str(e.value) and not (tmp_path / "out.jsonl").exists()


def test_a_grade_that_is_no_number_is_unscored(tmp_path):
    harmless = lambda grade: {"UnharmPair_text1": {"Question": "q", "Prediction": "p", "GPT-Score": grade}}
    imported(tmp_path, [AUTHORS | harmless(g) for g in (.5, float("nan"), "exception", True)], "--method", "po")
    line, = report(tmp_path / "out.jsonl")["rows"]
    assert (line["gpt_eval"], line["gpt_eval_n"], line["gpt_eval_unscored"]) == (.5, 1, 3)
    for option, value in (("--method", ""), ("--method", "a\nb"), ("--split", "nonsense")):
        with pytest.raises(SafeEraserError, match=option): imported(tmp_path, [AUTHORS], *(() if option == "--method" else ("--method", "po")), option, value)


@pytest.mark.parametrize("change", [{"tasks": 5}, {"tasks": {}}, {"tasks": {"pope": 5}}, {"tasks": {"pope": {}}}, {"tasks": {"pope": {"score": 7, "n": 1, "of": 1}}},
                                    {"tasks": {"pope": {"score": .5, "n": 0, "of": 1}}}])
def test_scores_of_another_form_are_one_sentence(tmp_path, change):
    write(tmp_path / "a", sarr(1))
    (tmp_path / "a" / "specificity.json").write_text(json.dumps({"schema_version": 1} | change))
    with pytest.raises(SafeEraserError, match="specificity.json, tasks"): told(tmp_path / "a")
