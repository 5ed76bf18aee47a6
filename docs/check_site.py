"""Opens every page of the built site in Chromium, as a reader would:

    python docs/check_site.py out/site [--pictures out/pictures]

It looks at each page at 1280 px in the light and at 390 px in the dark, and reports errors on the console, requests
that fail, links and anchors that lead nowhere, pictures that do not load, pages that are wider than the screen, and a
picture of the places that is cut off or too small. It searches for words that a reader would search for. Chromium is
the system's: on Debian and Ubuntu the package `chromium`.
"""

import argparse
import functools
import http.server
import shutil
import sys
import threading
from pathlib import Path
from typing import Any

from playwright.sync_api import ConsoleMessage, Page, Request, sync_playwright

SCREENS = ((1280, "light"), (390, "dark"))
# What a reader types, and a page that must be among the results.
SEARCHES = {
    "decoupled_decay": "reference/in_the_update.html",
    "bfloat16": "how_to/low_precision.html",
    "matches no parameter": "reference/errors.html",
    "Keras": "how_to/from_keras.html",
}
SMALLEST = 10  # Pixels: the smallest type in the picture of the places.
LOOK = """() => ({
    links: [...document.querySelectorAll("a[href]")].map(a => a.href),
    anchors: [...document.querySelectorAll("[id]")].map(e => e.id),
    blank: [...document.images].filter(i => i.offsetParent && !i.naturalWidth).map(i => i.src),
    width: document.documentElement.scrollWidth,
    places: [...document.querySelectorAll(".places .step, .places .place, .places code")].map(e => {
        const box = e.getBoundingClientRect();
        return [e.textContent.trim(), box.left, box.right, parseFloat(getComputedStyle(e).fontSize)];
    }),
})"""


def serve(folder: Path) -> str:
    """The address of the site, as long as this program runs."""

    class Quiet(http.server.SimpleHTTPRequestHandler):
        def log_message(self, format: str, *args: Any) -> None: ...

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), functools.partial(Quiet, directory=str(folder)))
    threading.Thread(target=server.serve_forever, daemon=True).start()
    return f"http://127.0.0.1:{server.server_port}/"


def chromium() -> str:
    for name in ("chromium", "chromium-browser", "google-chrome"):
        if path := shutil.which(name):
            return path
    sys.exit("There is no Chromium here. On Debian and Ubuntu: apt-get install chromium")


class Check:
    """What was found, and what the pages hold."""

    def __init__(self, folder: Path, pictures: Path | None) -> None:
        self.folder, self.pictures, self.base = folder, pictures, serve(folder)
        self.wrong: list[str] = []
        self.anchors: dict[str, set[str]] = {}
        self.links: dict[str, set[str]] = {}

    def watch(self, page: Page) -> None:
        def on_console(said: ConsoleMessage) -> None:
            if said.type == "error":
                self.wrong.append(f"{page.url}: {said.text}")

        def on_failure(asked: Request) -> None:
            # A request that was still on its way when the next page was opened is aborted. It is no fault of the site.
            if asked.failure != "net::ERR_ABORTED":
                self.wrong.append(f"{page.url}: could not load {asked.url}, {asked.failure}")

        page.on("console", on_console)
        page.on("pageerror", lambda error: self.wrong.append(f"{page.url}: {error}"))
        page.on("requestfailed", on_failure)

    def look(self, page: Page, name: str, width: int, scheme: str) -> None:
        page.goto(self.base + name)
        seen = page.evaluate(LOOK)
        self.anchors[name] = set(seen["anchors"])
        self.links[name] = {link.removeprefix(self.base) for link in seen["links"] if link.startswith(self.base)}
        self.wrong += [f"{name}: the picture {source} is blank" for source in seen["blank"]]
        if seen["width"] > width:
            self.wrong.append(f"{name}: {seen['width']} px wide on a screen of {width} px")
        for text, left, right, size in seen["places"]:
            if left < 0 or right > width or size < SMALLEST:
                self.wrong.append(f"{name}: {text!r} from {left} to {right} px in type of {size} px")
        if self.pictures:
            file = self.pictures / f"{name.removesuffix('.html').replace('/', '.')}-{width}-{scheme}.png"
            page.screenshot(path=str(file), full_page=True)

    def follow_links(self) -> None:
        for name, links in self.links.items():
            for link in sorted(links):
                target, _, anchor = link.partition("#")
                target = target.partition("?")[0] or "index.html"
                if not (self.folder / target).is_file():
                    self.wrong.append(f"{name}: links to {target}, which does not exist")
                elif anchor and target in self.anchors and anchor not in self.anchors[target]:
                    self.wrong.append(f"{name}: links to {link}, but there is no such place on that page")

    def search(self, page: Page) -> None:
        for words, expected in SEARCHES.items():
            page.goto(f"{self.base}search.html?q={words.replace(' ', '+')}")
            page.wait_for_function("document.querySelector('.search-summary')?.textContent.match(/[0-9]|no/)")
            page.wait_for_timeout(1000)
            found = page.eval_on_selector_all("ul.search li a", "links => links.map(link => link.href)")
            if not any(expected in link for link in found):
                self.wrong.append(f"search for {words!r}: {expected} is not among {len(found)} results")


def main() -> None:
    parser = argparse.ArgumentParser(description="Opens every page of the built site in Chromium.")
    parser.add_argument("site", type=Path, help="the folder of the built site")
    parser.add_argument("--pictures", type=Path, help="a folder for pictures of all pages")
    options = parser.parse_args()
    if options.pictures:
        options.pictures.mkdir(parents=True, exist_ok=True)
    names = sorted(str(path.relative_to(options.site)) for path in options.site.rglob("*.html"))
    names = [name for name in names if not name.startswith(("_static", "_modules"))]
    if not names:
        sys.exit(f"{options.site} has no pages. Build them: python -m sphinx -W --keep-going docs {options.site}")
    check = Check(options.site, options.pictures)
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=chromium(), args=["--no-sandbox"])
        for width, scheme in SCREENS:
            page = browser.new_page(viewport={"width": width, "height": 1000}, color_scheme=scheme)  # pyright: ignore[reportArgumentType]
            check.watch(page)
            for name in names:
                check.look(page, name, width, scheme)
        check.search(page)  # pyright: ignore[reportPossiblyUnboundVariable]
        browser.close()
    check.follow_links()
    wrong = list(dict.fromkeys(check.wrong))
    print("\n".join(wrong))
    print(f"{len(names)} pages on {len(SCREENS)} screens, {len(SEARCHES)} searches: {len(wrong)} faults")
    sys.exit(bool(wrong))


if __name__ == "__main__":
    main()
