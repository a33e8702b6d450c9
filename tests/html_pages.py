"What the tests of previews ask of a page: our tags alone, closed, nothing that runs, no color that a theme would hide."
import re
from html.parser import HTMLParser

STRANGE = ["<script>alert(1)</script>", "a\nb\x00\x1b[2J", "\u202egpj.exe", "\"><img src=x onerror=a>", "{0}{name}",
           "&lt;", "\udce9t\udce9", "x" * 100000]
TAGS = {"div", "span", "table", "tr", "th", "td", "b", "img", "svg", "polyline", "circle", "details", "summary", "pre"}


class Tags(HTMLParser):
    "Collects the tags and attributes of a page, and that each is closed."
    def __init__(self, page):
        HTMLParser.__init__(self)
        self.open = []
        self.seen = set()
        self.attributes = set()
        self.text = ""
        self.feed(page)
        assert self.open == []

    def handle_starttag(self, tag, attrs):
        self.seen.add(tag)
        self.attributes.update(name for name, _ in attrs)
        if tag != "img": self.open.append(tag)

    def handle_startendtag(self, tag, attrs): self.seen.add(tag)

    def handle_endtag(self, tag): assert self.open.pop() == tag

    def handle_data(self, data): self.text += data


def check(page):
    "The page's text, when it has only tags of ours, nothing that runs, and no color that a theme would hide."
    page.encode("utf-8")
    tags = Tags(page)
    assert tags.seen <= TAGS
    assert not {name for name in tags.attributes if name.startswith("on") or name == "href"}
    assert not re.search("[\x00-\x08\x0b-\x1f\u202e]", tags.text)
    assert not re.search(r"[;\"]color:(?!inherit)", page)
    assert "Html" not in tags.text
    return tags.text
