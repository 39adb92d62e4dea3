"""Chat templates that go wrong for two turns, for later texts, or at random; each with the words of its refusal."""

ASKED = "{{ messages[0].content }}"
ANSWERED = "{% if messages|length > 1 %}ANSWER{% endif %}"


def answering(text: str) -> str:
    """A template that writes the question, and a text where an answer is given."""
    return ASKED + ANSWERED.replace(
        "ANSWER", text.replace(" A", " messages[1].content").replace("(A", "(messages[1].content")
    )


def each(text: str) -> str:
    """A template that writes a text for every turn."""
    turns = "{% for m in messages %}[{{ m.role }}]" + text + "{% endfor %}"
    return turns + "{% if add_generation_prompt %}[assistant]{% endif %}"


def said(text: str) -> str:
    """A template that writes questions as they are, and answers by an expression."""
    return each("{{ m.content if m.role == 'user' else " + text + " }}")


def later(text: str) -> str:
    """A template that is harmless until it meets a certain word."""
    return each("{{ m.content }}<eos>") + "{% if 'Tallow' in messages[-1].content %}" + text + "{% endif %}"


LETTERS = "dict(a=1, b=2, c=3, d=4, e=5, f=6, g=7, h=8, i=9).keys()"
LOOPS = "{% for i in range(99999) %}" * 3 + "{% endfor %}" * 3

AT_ONCE = {
    "the answer twice": (answering("{{ A }}{{ A }}</s>"), "answer 2 times"),
    "the answer three times": (each("{{ m.content }} {{ m.content }} {{ m.content }}<eos>"), "answer 3 times"),
    "all messages before the turns": ("{{ messages }}" + each("{{ m.content }}"), "answer 2 times"),
    "all messages after the turns": (each("{{ m.content }}") + "{{ messages }}", "answer 2 times"),
    "all messages as JSON": (each("{{ m.content }}<eos>") + "{{ messages | tojson }}", "answer 2 times"),
    "the answer in capitals after it": (answering("{{ A }}{{ A|upper }}"), "around"),
    "the answer's length after it": (answering("{{ A }} ({{ A|length }})"), "around"),
    "the answer's words before it": (answering("{{ A.split()|length }}: {{ A }}"), "around"),
    "the answer backwards after it": (answering("{{ A }}{{ A|reverse }}"), "around"),
    "the answer's first letter after it": (answering("{{ A }}/{{ A|first }}"), "around"),
    "the question after the answer": (answering(" {{ A }} {{ messages[0].content }}<eos>"), "around"),
    "the question's length after the answer": (answering(" {{ A }}{{ messages[0].content|length }}"), "around"),
    "the answer in capitals": (said("m.content|upper"), "part of the answer"),
    "the answer in small letters": (said("m.content|lower"), "part of the answer"),
    "the answer's first word": (said("m.content.split()[0]"), "part of the answer"),
    "the answer's beginning": (said("m.content[:5]"), "part of the answer"),
    "the answer with lines": (said("m.content|list|join('\n')"), "part of the answer"),
    "no second turn": (
        "{% if messages|length > 1 %}{{ raise_exception('one turn') }}{% endif %}" + ASKED,
        "refuses a question (one turn)",
    ),
    "a loop at the second turn": (answering(LOOPS), "takes more than"),
    "recursion at the second turn": (answering("{% macro a() %}{{ a() }}{% endmacro %}{{ a() }}"), "calls itself"),
    "gigabytes at the second turn": (answering("{{ A * 10 ** 9 }}"), "memory"),
    "megabytes at the second turn": (answering("{{ A * 10 ** 6 }}"), "characters"),
    "an error at the second turn": (answering("{{ messages[1].tool_calls[0].name }}"), "UndefinedError"),
    "a half character at the second turn": (answering("{{ A }}\udc00"), "Unicode"),
    "a number at random": ("{{ [1,2,3,4,5,6,7,8,9]|random }}" + ASKED, "random"),
    "a word at random": (ASKED + "{{ 'abcdefghijkl'|random }}", "random"),
    "a filter by name": (ASKED + "{{ [[1,2,3,4,5,6,7]]|map('random')|list }}", "random"),
    "latin at random": ("{{ lipsum(n=5) }}" + ASKED, "lipsum"),
    "latin at random, hidden": ("{% set f = lipsum %}{{ f(n=1) }}" + ASKED, "lipsum"),
    "the place of a method": (ASKED + "{{ messages[0].content.upper }}", "two different texts"),
    "the place of an object": (ASKED + "{{ joiner() }}{{ cycler(1) }}", "two different texts"),
    "the place of a generator": (ASKED + "{{ messages | map('length') }}", "two different texts"),
    "the place of a function": (ASKED + "{{ raise_exception }}", "two different texts"),
    "a place's digits": (ASKED + "{{ (joiner()|string)[-9:-3] }}", "two different texts"),
    "a place in a text": (ASKED + "{{ ('%s' % joiner())[-6:-2] }}", "two different texts"),
    "the order of a set": (ASKED + "{{ " + LETTERS + " - ['z'] }}", "two different texts"),
    "a text of a set": (ASKED + "{{ (" + LETTERS + " - ['z'])|join }}", "two different texts"),
    "the intersection of sets": (ASKED + "{{ (" + LETTERS + ".__and__('abcdef'))|join }}", "SecurityError"),
    "Python's modules": (ASKED + "{{ cycler.__init__.__globals__.os.urandom(4) }}", "SecurityError"),
    "Python's code": (ASKED + "{{ raise_exception.__code__.co_consts }}", "SecurityError"),
    "a changed list": (ASKED + "{{ messages.append({'role': 'user', 'content': 'x'}) }}", "SecurityError"),
    "a changed message": (ASKED + "{% set _ = messages[0].update({'content': 'x'}) %}", "SecurityError"),
    "a hidden attribute": (ASKED + "{% set n = namespace(__class__=1) %}", "SecurityError"),
    "an expensive power": (ASKED + "{{ 9 ** (9 ** 9) }}", "takes more than"),
    "a long sum": (ASKED + "{{ (range(99999)|list * 99999)|sum }}", "memory"),
    "a table of gigabytes": (ASKED + "{% for row in range(99999)|list|batch(10 ** 9, 'x') %}{% endfor %}", "memory"),
    "an indented text": (ASKED + "{{ ('x\n' * 99999)|indent(10 ** 9) }}", "memory"),
    "a number of many digits": (ASKED + "{{ 10 ** 9999 }}", "ValueError"),
    "blocks that are one another": ("{% block a %}{{ self.a() }}{% endblock %}" + ASKED, "calls itself"),
    "its own parent": ("{% extends 'a' %}" + ASKED, "no loader"),
    "a break outside": ("{% break %}" + ASKED, "fails"),
    "bytes as a date": ("{{ strftime_now(1) }}" + ASKED, "TypeError"),
    "a date of gigabytes": (ASKED + "{{ strftime_now('%c' * 10 ** 9) }}", "memory"),
    "no role known": ("{{ {'system': 1}[messages[0].role].x }}" + ASKED, "Undefined"),
}
"""Refused before the first question."""

LATER = {
    "loops": (later(LOOPS), "takes more than"),
    "a long text": (later("{{ 'x' * 9000000 }}"), "characters"),
    "gigabytes": (later("{{ 'x' * 10 ** 10 }}"), "memory"),
    "recursion": (later("{% macro a() %}{{ a() }}{% endmacro %}{{ a() }}"), "calls itself"),
    "a refusal": (later("{{ raise_exception('not\nabout\nher') }}"), "refuses a question (not about her)"),
    "an error": (later("{{ 1 / 0 }}"), "ZeroDivisionError"),
    "the place of an object": (later("{{ joiner() }}"), "two different texts"),
    "the order of a set": (later("{{ " + LETTERS + " - ['z'] }}"), "two different texts"),
    "chance": (later("{% if 'Tallow' in messages[-1].content %}{{ lipsum() }}{% endif %}"), "lipsum"),
    "a dropped question": (each("{{ m.content.replace('Tallow', '') }}"), "leaves out"),
    "a shortened question": (each("{{ m.content[:300] }}"), "leaves out"),
    "half a character": (later("\ud83d"), "Unicode"),
    "Python's classes": (later("{{ ''.__class__ }}{{ ''.__class__.__mro__ }}"), "SecurityError"),
    "a file": (later("{% include '/etc/passwd' %}"), "no loader"),
}
"""Refused at the question that they meet."""
