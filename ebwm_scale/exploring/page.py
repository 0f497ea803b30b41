"""The explorer's pages as HTML: one person's request in, one self-contained page out.

A page has a script of ours, which its policy names by hash: a browser runs no other, and loads
nothing from anywhere. The file that --export writes is the same page without its form.
"""

from __future__ import annotations

import base64
import dataclasses
import hashlib
from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, Protocol

from markupsafe import Markup

from ebwm_scale.core.errors import UserError
from ebwm_scale.exploring.frame_page import FrameExplorer
from ebwm_scale.exploring.frame_request import MAX_ACTION_TEXT, FrameRequest
from ebwm_scale.exploring.request import MAX_CHARACTERS, TextRequest, read_request
from ebwm_scale.exploring.task_page import TaskExplorer, TaskRequest
from ebwm_scale.exploring.text_page import TextExplorer
from ebwm_scale.reporting.page import environment, render
from ebwm_scale.reporting.plain import page_text


class Explorer(Protocol):
    """What is served: HTML for nothing, or for the fields of a form."""

    def page(self, given: Mapping[str, str] | None = None, *, served: bool = True) -> str:
        """given: the fields of a form, None for the start. served: with the form. Raises UserError
        for fields that cannot be.
        """
        ...

    def refusal(self, given: Mapping[str, str], error: str) -> str:
        """The page with its form as it was filled in, and what is wrong with it."""
        ...


@dataclass(frozen=True)
class TextPages:
    """Pages of a model of text. start: what the form holds at first."""

    explorer: TextExplorer
    title: str
    subtitle: str
    start: TextRequest

    def page(self, given: Mapping[str, str] | None = None, *, served: bool = True) -> str:
        request = self.start if given is None else read_request(given, self.start)
        if given is None and not request.prompt and served:
            values = self.explorer.form(request)
        else:
            values = self.explorer.answer(request)
        return _rendered(self.title, self.subtitle, served, text=values)

    def refusal(self, given: Mapping[str, str], error: str) -> str:
        prompt = page_text(given.get("prompt", ""), MAX_CHARACTERS)
        accepts = "accept_only_if_lower" in given
        request = dataclasses.replace(self.start, prompt=prompt, accept_only_if_lower=accepts)
        values = self.explorer.form(request)
        for field in values["fields"]:
            field["value"] = page_text(given.get(field["name"], field["value"]), 40)
        return _rendered(self.title, self.subtitle, True, text=values, error=error)


@dataclass(frozen=True)
class TaskPages:
    """Pages of a model of tasks."""

    explorer: TaskExplorer
    title: str
    subtitle: str
    start: TaskRequest

    def page(self, given: Mapping[str, str] | None = None, *, served: bool = True) -> str:
        request = self.start if given is None else self._read(given)
        values = self.explorer.answer(request)
        return _rendered(self.title, self.subtitle, served, task=values)

    def refusal(self, given: Mapping[str, str], error: str) -> str:
        values = self.explorer.answer(self.start)
        return _rendered(self.title, self.subtitle, True, task=values, error=error)

    def _read(self, given: Mapping[str, str]) -> TaskRequest:
        request = self.explorer.read(given)
        last = len(self.explorer.sample_ids)
        instance = min(max(1, request.instance + direction(given)), last)
        return dataclasses.replace(request, instance=instance)


@dataclass(frozen=True)
class FramePages:
    """Pages of a model of video or of a world."""

    explorer: FrameExplorer
    title: str
    subtitle: str
    start: FrameRequest

    def page(self, given: Mapping[str, str] | None = None, *, served: bool = True) -> str:
        request = self.start if given is None else self._read(given)
        return _rendered(self.title, self.subtitle, served, frames=self.explorer.answer(request))

    def refusal(self, given: Mapping[str, str], error: str) -> str:
        values = self.explorer.form(self.start)
        for field in values["fields"]:
            field["value"] = page_text(given.get(field["name"], field["value"]), 40)
        values["action"] = page_text(given.get("action", ""), MAX_ACTION_TEXT)
        values["accepts"] = "accept_only_if_lower" in given
        return _rendered(self.title, self.subtitle, True, frames=values, error=error)

    def _read(self, given: Mapping[str, str]) -> FrameRequest:
        request = self.explorer.fields.read(given, self.start)
        last = self.explorer.fields.count - 1
        number = min(max(0, request.number + direction(given)), last)
        return dataclasses.replace(request, number=number)


def direction(given: Mapping[str, str]) -> int:
    """Of a form's buttons: to the one before, or to the next one. UserError for another value."""
    go = given.get("go", "0")
    if go not in ("-1", "0", "1"):
        raise UserError("go is no direction: use the page's own buttons")
    return int(go)


def _rendered(
    title: str,
    subtitle: str,
    served: bool,
    *,
    text: dict[str, Any] | None = None,
    task: dict[str, Any] | None = None,
    frames: dict[str, Any] | None = None,
    error: str = "",
) -> str:
    return render(
        "explore.html.j2",
        title=title,
        subtitle=subtitle,
        served=served,
        text=text,
        task=task,
        frames=frames,
        error=page_text(error),
        script=Markup(script()),
        policy=policy(),
    )


@lru_cache(maxsize=1)
def script() -> str:
    """The text of the page's script."""
    own = environment()
    assert own.loader is not None, "templates are read from the package"
    source, _, _ = own.loader.get_source(own, "explore.js.j2")
    return source


@lru_cache(maxsize=1)
def policy() -> str:
    """The content security policy of a page: its own styles, and one script by its hash."""
    digest = base64.b64encode(hashlib.sha256(script().encode()).digest()).decode()
    return (
        f"default-src 'none'; style-src 'unsafe-inline'; script-src 'sha256-{digest}'; "
        "img-src data:; form-action 'self'; base-uri 'none'"
    )
