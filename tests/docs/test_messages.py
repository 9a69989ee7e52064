"""Every error of the package has its paragraph in docs/troubleshooting.md."""

from __future__ import annotations

import re

import error_messages
import pytest

from kpsvd_tune import errors

PAGE = error_messages.PAGE.read_text(encoding="utf-8")


def test_every_error_has_a_paragraph_and_every_paragraph_an_error():
    found = error_messages.treated(PAGE)
    assert sum(map(len, found.values())) > 400
    assert all(found.values())
    kinds = {message.kind for messages in found.values() for message in messages}
    # The two that are only parents of others are never raised themselves.
    assert kinds == error_messages.CLASSES - {"KpsvdTuneError"}


def test_a_message_of_a_room_without_a_paragraph_is_refused():
    page = PAGE.replace("HubError; ", "")
    with pytest.raises(ValueError, match=r"publish/hub.py:\d+: .* no paragraph for a HubError"):
        error_messages.treated(page)


def test_a_paragraph_that_nothing_leads_to_is_refused():
    page = PAGE.replace("messages: HubError", "messages: HubError linalg/; HubError")
    with pytest.raises(ValueError, match="nothing raises: .*linalg/"):
        error_messages.treated(page)
    with pytest.raises(ValueError, match="The hub: there is no error HubFault"):
        error_messages.treated(PAGE.replace("messages: HubError", "messages: HubFault"))


def test_paragraphs_show_their_messages_on_the_site():
    page = error_messages.filled(PAGE)
    assert re.search(r"## The hub\n.*\n\n\?\?\? note \"The messages \(\d+\)\"\n", page)
    assert "    - `the hub cannot be reached: check the network and try again (" in page


def test_every_exit_code_is_explained():
    for name in error_messages.CLASSES - {"StoppedBySignal"}:
        code = getattr(errors, name).exit_code
        assert re.search(rf"^\| {code} \|", PAGE, re.MULTILINE), name
    assert re.search(rf"^\| {errors.UNSAVED_EXIT_CODE} \|", PAGE, re.MULTILINE)
