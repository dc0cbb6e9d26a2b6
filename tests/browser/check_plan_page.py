"""The page of ``plan --html`` in a headless Chromium: no message on its console, every section filled, nothing wider
than the window, at two widths, in light and dark, at every point. ``make plan-page-check``; needs a ``chromium``.

    python tests/browser/check_plan_page.py [report.html] [--out FOLDER]   # screenshots go there (build/plan-page)
"""

import argparse
import copy
import json
import re
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

from hf_automodel_parallel.planner.explanation import Explanation
from hf_automodel_parallel.planner.grid import Grid
from hf_automodel_parallel.planner.page import page

ROOT = Path(__file__).resolve().parents[2]
BROWSERS = ("chromium", "chromium-browser", "google-chrome", "chrome")

#: Runs behind the page's own script: it uses the page as a reader does, and leaves what it saw in the document.
DRIVE = Path(__file__).with_suffix(".js")


def example() -> str:
    """The stored plan, with its other modes, and a wider tp: what stands in for more points here is not measured."""
    plan = json.loads((ROOT / "docs" / "plan-llama-3.1-405b.json").read_text())
    plan["about"]["gpu_memory"] = 80 << 30
    points = []
    for tp in (8, 16):
        for mode, its in plan["by_checkpointing"].items():
            other = copy.deepcopy(plan)
            other["about"]["checkpointing"] = mode
            other["memory"] |= its
            other["peaks"]["layers' backward"] = its["peak"]
            other["sizes"] |= {"tp": tp, "dp_shard": 1024 // tp}
            points.append(Explanation(**other))
    return page(Grid(points[0], points, [{"tp": 3, "sequence": 8192, "reason": "tp=3 does not divide 1024 ranks."}]))


def check(browser: str, text: str, out: Path, width: int, dark: bool) -> list[str]:
    """What is wrong at one width in one scheme; the screenshot is written to ``out``."""
    name = f"{width}-{'dark' if dark else 'light'}"
    file = out / f"{name}.html"
    file.write_text(text.replace("</body>", f"<script>{DRIVE.read_text()}</script></body>"), encoding="utf-8")
    common = [
        browser,
        "--headless=new",
        "--no-sandbox",
        "--disable-gpu",
        "--hide-scrollbars",
        "--enable-logging=stderr",
    ]
    common += [f"--window-size={width},4200", f"--blink-settings=preferredColorScheme={0 if dark else 1}"]
    with tempfile.TemporaryDirectory() as profile:
        common.append(f"--user-data-dir={profile}")
        dumped = subprocess.run([*common, "--dump-dom", file.as_uri()], capture_output=True, text=True, timeout=180)
        shot = [*common, f"--screenshot={out / f'{name}.png'}", file.as_uri()]
        subprocess.run(shot, capture_output=True, timeout=180, check=True)
    wrong = [line for line in dumped.stderr.splitlines() if "CONSOLE" in line]
    found = re.search(r'<pre id="checked"[^>]*>(.*?)</pre>', dumped.stdout, re.S)
    if found is None:
        return [*wrong, "the page's script did not come to its end"]
    said = json.loads(found[1].replace("&gt;", ">").replace("&lt;", "<").replace("&amp;", "&"))
    light = sum(map(int, re.findall(r"\d+", said["background"])[:3])) > 384
    if light == dark:
        wrong.append(f"background {said['background']}")
    return wrong + said["wrong"]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("page", nargs="?", type=Path, help="a report; without it one is made from the stored plan")
    parser.add_argument("--out", type=Path, default=ROOT / "build" / "plan-page")
    given = parser.parse_args()
    browser = next(filter(None, map(shutil.which, BROWSERS)), None)
    if browser is None:
        print(f"no browser: install one of {', '.join(BROWSERS)}")
        return 2
    out = given.out.resolve()
    out.mkdir(parents=True, exist_ok=True)
    text = example() if given.page is None else given.page.read_text(encoding="utf-8")
    failed = 0
    for width in (1400, 500):
        for dark in (False, True):
            wrong = check(browser, text, out, width, dark)
            failed += bool(wrong)
            print(f"{width} px, {'dark' if dark else 'light'}: {'; '.join(wrong) or 'ok'}")
    print(f"screenshots: {out}")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
