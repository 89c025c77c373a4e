"""One page of the dashboard without a browser, opened as a link to it opens it."""

from __future__ import annotations

from typing import Any

from streamlit.testing.v1 import AppTest

from probe.dashboard.views import pick


def open_view(name: str, **query: Any) -> AppTest:
    """Return a page by the name of its view, with `query` in its address."""
    pick.rows.clear()  # type: ignore[attr-defined]  # what an earlier test's folder held
    script = f"from probe.dashboard.views import {name}\n\n{name}.show()\n"
    app = AppTest.from_string(script, default_timeout=60)
    for key, value in query.items():
        app.query_params[key] = value
    app.run()
    assert not app.exception, name
    return app
