"""A process that renders chat templates: started by `unlearning.data.template_sandbox`, never imported.

A template comes with a model, from a stranger. transformers' sandbox keeps it from Python, but not from loops without
end and texts of gigabytes. Here it has a process of its own, which the system ends when the time is over, and which
cannot get more memory. Requests and answers are one line of JSON each.
"""

import json
import resource
import signal
import sys
import time
from datetime import datetime
from typing import Any


class _Clock:
    """The clock of `strftime_now`, which stands still."""

    today = datetime(2000, 1, 1)

    @classmethod
    def now(cls) -> datetime:
        return cls.today


def _rendered(request: dict[str, Any], render: Any) -> dict[str, Any]:
    from jinja2 import TemplateError

    _Clock.today = datetime.fromisoformat(request["date"])
    # The processor time of this process; a template cannot wait. The signal ends the process, also within C code.
    signal.setitimer(signal.ITIMER_PROF, request["seconds"])
    started = time.process_time()
    try:
        texts, _ = render(
            [request["messages"]],
            chat_template=request["template"],
            add_generation_prompt=request["add_generation_prompt"],
            continue_final_message=request["continue_final_message"],
            **request["variables"],
        )
        if len(texts[0]) > request["characters"]:
            return {"error": f"writes {len(texts[0])} characters"}
        texts[0].encode()  # half a surrogate pair is no text
        return {"text": texts[0], "took": time.process_time() - started}
    except MemoryError:
        return {"error": "needs too much memory"}
    except RecursionError:
        return {"error": "is nested too deep, or calls itself without end"}
    except Exception as error:
        refused = type(error) is TemplateError  # the template's own raise_exception
        reason = str(error)[:500]
        if refused:
            return {"error": f"refuses a question ({reason})", "refused": True}
        return {"error": f"fails ({type(error).__name__}: {reason})"}
    finally:
        signal.setitimer(signal.ITIMER_PROF, 0)


def main() -> None:
    """Answer requests until the other side closes the pipe."""
    import jinja2
    import transformers.utils.chat_template_utils as templates

    templates.datetime = _Clock  # type: ignore[misc,assignment]
    del jinja2.filters.FILTERS["random"], jinja2.defaults.DEFAULT_NAMESPACE["lipsum"]  # another text every time
    memory = int(sys.argv[2])
    resource.setrlimit(resource.RLIMIT_AS, (memory, memory))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    for line in sys.stdin:
        try:
            answer = json.dumps(_rendered(json.loads(line), templates.render_jinja_template))
        except MemoryError:
            answer = '{"error": "needs too much memory"}'
        sys.stdout.write(answer + "\n")
        sys.stdout.flush()


if __name__ == "__main__":
    sys.path[:] = json.loads(sys.argv[1])
    main()
