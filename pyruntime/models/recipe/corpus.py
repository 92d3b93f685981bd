"""Turn permissively licensed documentation and source into training text.

Usage: ``python corpus.py OUTPUT_DIRECTORY [DIRECTORY_WITH_DEBS]``. Packages that are not in the
second directory are downloaded with ``apt-get download``. Every document goes wholly to ``train``
or to ``held_out`` (2 %) by a hash of its name, so the split does not depend on the order of files.
"""

import hashlib
import html
import re
import subprocess
import sys
import sysconfig
import tempfile
from html.parser import HTMLParser
from pathlib import Path

DEBS = {"python3.11-doc": "PSF-2.0", "rust-doc": "MIT or Apache-2.0", "nodejs-doc": "MIT"}
SEPARATOR = "<|endoftext|>"
CHAT = "<|im_start|>user\n{}<|im_end|>\n<|im_start|>assistant\n{}<|im_end|>\n"
BLOCKS = {"p", "div", "li", "dt", "dd", "h1", "h2", "h3", "h4", "tr", "pre", "section", "ul", "br"}
SKIPPED = {"script", "style", "nav", "head", "button", "svg", "form", "footer"}


class Text(HTMLParser):
    """The readable text of a page, and (heading, first paragraph) pairs for questions."""

    def __init__(self):
        super().__init__(convert_charrefs=True)
        self.parts, self.pairs = [], []
        self.skip, self.pre = 0, 0
        self.heading, self.capture, self.buffer = "", "", ""

    def handle_starttag(self, tag, attributes):
        classes = dict(attributes).get("class") or ""
        if tag in SKIPPED:
            self.skip += 1
        elif tag in BLOCKS:
            self.parts.append("\n")
        self.pre += tag == "pre"
        if tag in ("h1", "h2", "h3", "h4") or (tag == "dt" and "sig" in classes):
            self.capture, self.buffer = "heading", ""
        elif tag == "p" and self.heading:
            self.capture, self.buffer = "paragraph", ""

    def handle_endtag(self, tag):
        if tag in SKIPPED:
            self.skip = max(0, self.skip - 1)
        elif tag in BLOCKS:
            self.parts.append("\n")
        self.pre = max(0, self.pre - (tag == "pre"))
        text = " ".join(self.buffer.replace("¶", "").split())
        if self.capture == "heading" and tag in ("h1", "h2", "h3", "h4", "dt"):
            self.heading, self.capture = text, ""
        elif self.capture == "paragraph" and tag == "p":
            if 40 <= len(text) <= 600:
                self.pairs.append((self.heading, text))
            self.heading, self.capture = "", ""

    def handle_data(self, data):
        if self.skip:
            return
        if self.capture:
            self.buffer += data
        self.parts.append(data if self.pre else re.sub(r"\s+", " ", data))

    def text(self):
        """Return the page with blank lines squeezed."""
        joined = "".join(self.parts).replace("¶", "").replace("\u200b", "")
        lines = [line.rstrip() for line in joined.split("\n")]
        return re.sub(r"\n{3,}", "\n\n", "\n".join(lines)).strip()


QUESTIONS = (
    "What is {}?",
    "Explain {}.",
    "Tell me about {}.",
    "What does {} do?",
    "Can you describe {}?",
)


def question(heading):
    """Ask about a heading or a signature; which way follows from its hash."""
    subject = re.sub(r"\(.*", "", heading) if "(" in heading else heading
    subject = re.sub(r"^[\d.]+\s*", "", subject).strip(" :.")
    if not 3 <= len(subject) <= 60:
        return None
    pick = _digest(heading)[0] % len(QUESTIONS)
    return QUESTIONS[pick].format(subject)


def _digest(text):
    return hashlib.sha256(text.encode()).digest()


def pages(root):
    """Yield the name, text and chats of every page below `root`, in the order of a hash."""
    files = [path for path in root.rglob("*.html") if not path.is_symlink()]
    for path in sorted(files, key=lambda path: _digest(path.relative_to(root).as_posix())):
        if re.search(r"genindex|search|print\.html|all\.html", path.name):
            continue
        if path.stat().st_size > 400_000:
            continue
        parser = Text()
        parser.feed(path.read_text(errors="replace"))
        text = parser.text()
        if len(text) < 400:
            continue
        chats = []
        for heading, paragraph in parser.pairs:
            asked = question(html.unescape(heading))
            if asked:
                chats.append(CHAT.format(asked, paragraph))
        yield path.relative_to(root).as_posix(), text, chats


def unpack(name, cache, work):
    """Unpack a Debian package, downloading it when it is not in `cache`."""
    found = sorted(cache.glob(f"{name}_*.deb"))
    if not found:
        subprocess.run(["apt-get", "download", name], cwd=cache, check=True)
        found = sorted(cache.glob(f"{name}_*.deb"))
    target = work / name
    subprocess.run(["dpkg-deb", "-x", found[-1], target], check=True)
    return found[-1].name, target


def standard_library():
    """Yield the modules of Python's standard library, without its tests."""
    root = Path(sysconfig.get_paths()["stdlib"])
    for path in sorted(root.rglob("*.py")):
        name = path.relative_to(root).as_posix()
        if re.search(
            r"(^|/)(tests?|idle_test|site-packages|dist-packages|encodings|config-)", name
        ):
            continue
        text = path.read_text(errors="replace")
        if 400 < len(text) < 400_000:
            yield f"stdlib/{name}", text, []


def main(output, cache):
    """Write train.txt, held_out.txt and sources.txt."""
    output.mkdir(parents=True, exist_ok=True)
    cache.mkdir(parents=True, exist_ok=True)
    seen, splits, sources = set(), {"train": [], "held_out": []}, []

    def take(origin, documents, limit):
        total = 0
        for name, text, chats in documents:
            digest = _digest(text)
            if digest in seen:
                continue
            seen.add(digest)
            held = _digest(f"{origin}/{name}")[0] < 5
            splits["held_out" if held else "train"].append((digest, text + SEPARATOR))
            for first in range(0, len(chats), 4):
                block = "".join(chats[first : first + 4]) + SEPARATOR
                key = _digest(block)
                splits["held_out" if held else "train"].append((key, block))
            total += len(text)
            if total > limit:
                break
        sources.append(f"{origin}: {total} characters")

    with tempfile.TemporaryDirectory() as work:
        for package in DEBS:
            deb, root = unpack(package, cache, Path(work))
            take(deb, pages(root), 9_000_000)
        take(f"standard library of Python {sys.version.split()[0]}", standard_library(), 9_000_000)
    for split, documents in splits.items():
        documents.sort()  # shuffled by hash
        (output / f"{split}.txt").write_text("".join(text for _, text in documents))
    (output / "sources.txt").write_text("\n".join(sources) + "\n")
    print("\n".join(sources))


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2] if len(sys.argv) > 2 else "debs"))
