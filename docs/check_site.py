"""The built site in a real browser: `make docs-check`, or `python docs/check_site.py [--shots FOLDER]`.

Every page: nothing is fetched from elsewhere, no error in the console, all links and anchors inside the site resolve,
plots load, nothing sticks out of a narrow screen, text is readable in both colour schemes. Search finds pages, from a
server and from a folder. Needs playwright and a Chromium (Debian: the package chromium).
"""

from __future__ import annotations

import argparse
import functools
import http.server
import pathlib
import shutil
import sys
import threading
from typing import Any
from urllib.parse import unquote, urlsplit

from playwright.sync_api import Browser, Page, TimeoutError, sync_playwright

SITE = pathlib.Path(__file__).resolve().parent.parent / "build" / "site"
NARROW, WIDE = {"width": 390, "height": 844}, {"width": 1280, "height": 900}
# Ratios of luminance by WCAG 2.1: 4.5 for text; tokens of highlighted code and faint marks may have 3.
CONTRAST, FAINT = 4.5, 3.0

LINKS = "() => [...document.querySelectorAll('a[href]')].map(a => a.href)"
IMAGES = "() => [...document.images].filter(i => !(i.complete && i.naturalWidth)).map(i => i.src)"
# What sticks out, apart from what scrolls inside itself.
WIDER = """() => document.documentElement.scrollWidth <= innerWidth ? [] :
  [...document.querySelectorAll('.md-content *')].filter(e => e.getBoundingClientRect().right > innerWidth + 1 &&
    !e.closest('.md-typeset__scrollwrap, pre, .highlight')).map(e => e.tagName + ': ' + e.textContent.slice(0, 60))
    .slice(0, 3).concat('the page is ' + document.documentElement.scrollWidth + ' wide')"""
# Text of too little contrast with what is behind it.
UNREADABLE = """([strong, faint]) => {
  const channels = c => { const m = c.match(/[\\d.]+/g).map(Number); return [m[0], m[1], m[2], m[3] ?? 1] }
  const over = (top, under) => top.slice(0, 3).map((v, i) => v * top[3] + under[i] * (1 - top[3]))
  const light = c => { const l = c.slice(0, 3).map(v => (v /= 255) <= .03928 ? v / 12.92 : ((v + .055) / 1.055) ** 2.4)
    return .2126 * l[0] + .7152 * l[1] + .0722 * l[2] }
  const behind = e => { const stack = []
    for (; e; e = e.parentElement) stack.push(channels(getComputedStyle(e).backgroundColor))
    return stack.reverse().reduce((under, top) => [...over(top, under), 1], [255, 255, 255, 1]) }
  const found = new Map()
  for (const e of document.querySelectorAll('.md-content *, .md-nav a')) {
    const own = [...e.childNodes].some(n => n.nodeType === 3 && n.textContent.trim())
    if (!own || !e.checkVisibility({ opacityProperty: true, visibilityProperty: true })) continue
    if (e.matches('.headerlink')) continue
    const back = behind(e), text = over(channels(getComputedStyle(e).color), back)
    const [a, b] = [light(text), light(back)], ratio = (Math.max(a, b) + .05) / (Math.min(a, b) + .05)
    if (ratio < (e.closest('.highlight, pre, .doc-heading, .doc-signature, .md-nav') ? faint : strong))
      found.set(e.tagName + '.' + e.className, `${ratio.toFixed(1)} ${e.textContent.trim().slice(0, 40)}`)
  }
  return [...found].map(([k, v]) => `${k}: ${v}`) }"""


class Quiet(http.server.SimpleHTTPRequestHandler):
    """A file server that logs nothing."""

    def log_message(self, *_: Any) -> None:
        """Say nothing."""


def serve() -> tuple[http.server.ThreadingHTTPServer, str]:
    """The site on a free port of this machine."""
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), functools.partial(Quiet, directory=str(SITE)))
    threading.Thread(target=server.serve_forever, daemon=True).start()
    return server, f"http://127.0.0.1:{server.server_port}"


def anchors(page: Page) -> set[str]:
    """Every id of the page that is open."""
    found: list[str] = page.evaluate("() => [...document.querySelectorAll('[id]')].map(e => e.id)")
    return set(found)


def check_pages(browser: Browser, root: str, shots: pathlib.Path | None) -> list[str]:
    """Look at every page, wide and narrow, in both schemes."""
    problems: list[str] = []
    ids: dict[str, set[str]] = {}
    links: list[tuple[str, str]] = []
    for scheme, size in (("light", WIDE), ("dark", WIDE), ("light", NARROW), ("dark", NARROW)):
        context = browser.new_context(color_scheme=scheme, viewport=size)  # type: ignore[arg-type]
        page = context.new_page()
        told: list[str] = []
        page.on("console", lambda message, told=told: told.append(message.text) if message.type == "error" else None)
        page.on("pageerror", lambda error, told=told: told.append(str(error)))
        page.on("request", lambda r, told=told: None if r.url.startswith((root, "data:")) else told.append(r.url))
        page.on("requestfailed", lambda request, told=told: told.append(f"failed: {request.url}"))
        for path in sorted(SITE.rglob("*.html")):
            name = str(path.relative_to(SITE))
            if name == "404.html":
                continue
            page.goto(f"{root}/{name}", wait_until="networkidle")
            label = f"{name} ({scheme}, {size['width']})"
            problems += [f"{label}: {text}" for text in told]
            told.clear()
            page.evaluate("() => document.querySelectorAll('details').forEach(each => each.open = true)")
            problems += [f"{label}: does not load: {url}" for url in page.evaluate(IMAGES)]
            problems += [f"{label}: {text}" for text in page.evaluate(WIDER)]
            problems += [f"{label}: contrast {text}" for text in page.evaluate(UNREADABLE, [CONTRAST, FAINT])]
            wanted = {"light": "default", "dark": "slate"}[scheme]
            if (got := page.get_attribute("body", "data-md-color-scheme")) != wanted:
                problems.append(f"{label}: the scheme is {got}")
            if scheme == "light" and size is WIDE:
                ids[name] = anchors(page)
                links += [(name, link) for link in page.evaluate(LINKS)]
            if shots:
                page.evaluate("() => document.querySelectorAll('details').forEach(each => each.open = false)")
                file = f"{name.removesuffix('.html').replace('/', '-')}-{scheme}-{size['width']}.png"
                page.screenshot(path=str(shots / file), full_page=size is NARROW)
        context.close()
    return problems + check_links(root, ids, links)


def check_links(root: str, ids: dict[str, set[str]], links: list[tuple[str, str]]) -> list[str]:
    """Links within the site that lead nowhere."""
    problems = set()
    for name, link in links:
        if not link.startswith(root):
            continue
        parts = urlsplit(link)
        target = unquote(parts.path).strip("/") or "index.html"
        if target in ids:
            if parts.fragment and unquote(parts.fragment) not in ids[target]:
                problems.add(f"{name}: no #{parts.fragment} in {target}")
        elif not (SITE / target).is_file():
            problems.add(f"{name}: no {target}")
    return sorted(problems)


def check_search(browser: Browser, root: str, shots: pathlib.Path | None) -> list[str]:
    """Look for a few words; follow the first result."""
    problems = []
    where = urlsplit(root).scheme
    for word in ("merge_and_unload", "double quantization", "FASTLORA_LOW_MEMORY"):
        context = browser.new_context(viewport=WIDE)  # type: ignore[arg-type]
        page = context.new_page()
        page.goto(f"{root}/index.html")
        page.click(".md-search__input")
        page.keyboard.type(word)
        try:
            page.wait_for_selector(".md-search-result__item a", timeout=15_000)
            if shots:
                page.screenshot(path=str(shots / f"search-{where}.png"))
            page.click(".md-search-result__item a")
            page.wait_for_load_state()
            text = page.text_content(".md-content", timeout=15_000) or ""
        except TimeoutError:
            problems.append(f"search ({where}): nothing for {word!r}, or a result that leads nowhere")
        else:
            if word.split("_")[0].split()[0].lower() not in text.lower():
                problems.append(f"search ({where}): {word!r} leads to {page.url}, which does not hold it")
        context.close()
    return problems


def check_toggle(browser: Browser, root: str) -> list[str]:
    """The button changes the scheme, and the next page remembers."""
    context = browser.new_context(color_scheme="light", viewport=WIDE)  # type: ignore[arg-type]
    page = context.new_page()
    page.goto(f"{root}/index.html")
    page.click("label[title='Dark mode']")
    page.goto(f"{root}/qlora.html")
    got = page.get_attribute("body", "data-md-color-scheme")
    context.close()
    return [] if got == "slate" else [f"dark mode does not stay: {got}"]


def main() -> int:
    """Check all, say what is wrong."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shots", type=pathlib.Path, help="leave a picture of every page there")
    parser.add_argument("--browser", default=shutil.which("chromium") or shutil.which("google-chrome"))
    options = parser.parse_args()
    if options.browser is None or not (SITE / "index.html").is_file():
        print("needs a Chromium (--browser FILE) and a built site (make docs)", file=sys.stderr)
        return 2
    if options.shots:
        options.shots.mkdir(parents=True, exist_ok=True)
    server, root = serve()
    with sync_playwright() as play:
        browser = play.chromium.launch(executable_path=options.browser, args=["--no-sandbox"])
        problems = check_pages(browser, root, options.shots)
        problems += check_toggle(browser, root)
        for place in (root, SITE.as_uri()):
            problems += check_search(browser, place, options.shots)
        version = browser.version
        browser.close()
    server.shutdown()
    pages = len(list(SITE.rglob("*.html")))
    print("\n".join([*problems, f"{pages} pages in Chromium {version}: {len(problems)} problems"]))
    return 1 if problems else 0


if __name__ == "__main__":
    sys.exit(main())
