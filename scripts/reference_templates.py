#!/usr/bin/env python3
"""Writes src/api/prompt/template/reference.json: what Jinja2 renders, set up as Hugging Face transformers sets it up for chat templates.

    pip install jinja2 && python scripts/reference_templates.py

The tests render the same templates and compare. `null` stands for a template that fails.
"""

import json
from pathlib import Path

import jinja2
import jinja2.ext
from jinja2.sandbox import ImmutableSandboxedEnvironment

TARGET = Path(__file__).parent.parent / "src/api/prompt/template/reference.json"

VARIABLES = {
    "text": "  Hello wörld, hello!  ",
    "think": "<think>\nfoo\n</think>\n\nbar",
    "path": "a.b.c.d",
    "empty": "",
    "items": [3, 1, 2],
    "words": ["b", "A", "c"],
    "nested": {"b": [1, 2.5, None, True, "it's"], "a": {}, "c": "\"q\"\n"},
    "messages": [
        {"role": "system", "content": "S"},
        {"role": "user", "content": "U", "n": 2},
        {"role": "assistant", "content": "A", "n": 1},
    ],
    "null": None,
    "flag": True,
    "small": 1e-07,
    "large": 1e16,
    "ratio": 0.1,
    "whole": 2.0,
    "many": 12345678901234567890,
}

# Values that templates ask about, each with every test.
SUBJECTS = ["none", "missing", "''", "'abc'", "'Abc'", "0", "3", "1.5", "true", "[]", "[1]", "{}", "{'a': 1}", "(1, 2)",
            "range(2)", "namespace(a=1)", "messages", "messages[0]", "messages[0].role", "messages[0].nothing", "dict(a=1)", "joiner()"]
TESTS = ["iterable", "sequence", "mapping", "string", "number", "integer", "float", "boolean", "none", "defined", "undefined", "true", "false",
         "callable"]

EXPRESSIONS = """
missing|length
missing|count
missing|items|list
missing|list
missing|join(',')
missing|first is defined
missing|last is defined
missing|upper
missing|trim
missing|string
missing|int
missing|float
missing|default('d')
missing|default('d', true)
missing|default(none)
missing|default(none) is none
missing|default(default_value=none) is none
''|default(none, true) is none
nested.get('z', none) is none
{'items': 1, 'keys': 2, 'get': 3}.items()|list
{'items': 1}.keys()|list
{'get': 1}.get('get')
missing|tojson
missing|replace('a', 'b')
missing|reverse|list
missing|map('upper')|list
missing|selectattr('x')|list
missing|sum
missing|unique|list
missing|sort
missing ~ 'x'
missing + 'x'
missing == none
missing.x
missing.x.y
missing()
not missing
missing in ['a']
'a' in missing
messages[9] is defined
messages[0].nothing.more
none|length
none|string
none|list
none|int
none|default('d')
none|default('d', true)
none ~ 'x'
''|default('d')
''|default('d', true)
''|default('d', boolean=true)
''|default(default_value='d', boolean=true)
''|default(default_value='d')
missing|default(default_value='d')
0|default(5, boolean=true)
''|d('d', boolean=true)
false|default('x')
'zz'|int
'zz'|int(5)
'zz'|int(default=5)
'12'|int
' 12 '|int
'1_000'|int
'12.7'|int
'0x1f'|int(base=16)
'0x1f'|int(0, 16)
'-3'|int
'1e3'|int
3.9|int
-3.9|int
true|int
[]|int
'1.5'|float
'zz'|float
'zz'|float(2.5)
'inf'|float
'3'|float
small|tojson
large|tojson
ratio|tojson
whole|tojson
many|tojson
small
large
ratio
whole
many
1e100
123456789.125
0.0001
0.00001
-0.0
1e15
1e21|tojson
[small, large, ratio]|tojson
{'a': small}|tojson
nested|tojson
nested|tojson(indent=2)
nested|tojson(ensure_ascii=False)
text|tojson(ensure_ascii=True)
'😀é'|tojson(true)
nested|tojson(sort_keys=true)
nested|tojson(separators=(',', ':'))
nested|tojson(indent=4, separators=(',', ': '))
(1, 2)|tojson
"</script>'&"|tojson
'\u0001\u007f\u2028'|tojson
nested
[1, 'a', none, 1.5, true]
['it\\'s', "q\\"", 'b\\\\', 'new\\nline', 'é']
{'a': 'b', 1: [none]}
(1, 'a')
(1,)
[]
{}
[[]]
words|string
nested|string
'x' ~ [1, 'a']
'x' ~ {'a': none}
'x' ~ 1.0
'x' ~ small
words|join(', ')
[1, none, 'a', 1.5, [2]]|join('|')
messages|join(', ', attribute='role')
small|string
flag|string
'%s' % 'x'
"%s" % 5
'%s and %s' % ('a', 'b')
'%s' % none
'%s' % [1, 'a']
'%d items' % 3
'%05.1f|%x|%%' % (2.345, 255)
'%s' % messages[0].role
'%s' % messages[0]['role']|upper
'%s' % text.strip()
'%s' % ('a' ~ 'b')
'a' ~ '%s' % 'x' ~ 'b'
'%s' % 'x' == 'x'
('%s' % 'a') + 'b'
'%s' % 'a' + 'b'
'%s: %s' % (messages[0].role, messages[0].content) ~ '!'
'%(a)s' % {'a': 1}
'%r' % 'x'
'%s %s' % 'x'
'100%'
'a % b'
7 % 3
-7 % 3
7.5 % 2
10 % 4 * 2
'%s'|format('x')
'%s-%s'|format(1, 'a')
'{}-{}'.format(1, 'a')
'{a}'.format(a=5)
'{0} {1} {0}'.format('a', 'b')
'{:>5}|{:.2f}'.format('a', 2.345)
'a b  c'.split()
'a b  c'.split(' ')
'a b  c'.split(' ', 1)
'a b  c'.split(maxsplit=1)
'  a b  c '.split(none, 1)
'a,b,c'.split(',', maxsplit=1)
'a,b,c'.split(sep=',')
'a,b,c'.split(sep=',', maxsplit=1)
''.split()
''.split(',')
'a,b,c'.rsplit(',')
'a,b,c'.rsplit(',', 1)
'a,b,c'.rsplit(',', maxsplit=1)
' a b c '.rsplit()
' a b  c '.rsplit(none, 1)
' a b c '.rsplit(maxsplit=1)
'a,b'.split('')
think.split('</think>')[-1].lstrip('\\n')
think.split('</think>')[0].rstrip('\\n').split('<think>')[-1].lstrip('\\n')
think.partition('</think>')
think.partition('</think>')[2]
'abc'.partition('x')
'a.b.c'.rpartition('.')
'abc'.rpartition('x')
'abcabc'.replace('b', 'x')
'abcabc'.replace('b', 'x', 1)
'abcabc'.replace('b', 'x', -1)
'abc'.replace('', '-')
'abcabc'|replace('b', 'x')
'abcabc'|replace('b', 'x', 1)
'abcabc'|replace('b', 'x', count=1)
5|replace('5', 'x')
'prefix-x'.removeprefix('prefix-')
'prefix-x'.removeprefix('no')
'x-suffix'.removesuffix('-suffix')
'x-suffix'.removesuffix('')
'hello'.index('l')
'hello'.index('z')
'hello'.rindex('l')
'hello'.find('l')
'hello'.find('l', 3)
'hello'.find('l', 3, 4)
'hello'.find('z')
'hello'.rfind('l')
'wörld'.find('l')
'wörld'.index('d')
'hello'.count('l')
'hello'.count('')
'hello'.startswith('he')
'hello'.startswith(('x', 'he'))
'hello'.startswith('l', 2)
'hello'.endswith('lo')
'hello'.endswith(('x', 'lo'))
'Hello'.swapcase()
'HELLO'.casefold()
'hello world'.title()
"it's a dog's".title()
"it's a dog's"|title
'hello WORLD'.capitalize()
'5'.zfill(3)
'-5'.zfill(4)
'a'.ljust(3) ~ '|'
'a'.rjust(3, '.') ~ '|'
'a'.center(4, '*')
'a\\tb'.expandtabs(4)
'a\\nb\\r\\nc'.splitlines()
'a\\nb\\r\\nc\\n'.splitlines(true)
'a\\nb'.splitlines(keepends=true)
'abc'.isalpha()
'ab1'.isalnum()
'12'.isdigit()
'1.2'.isdigit()
'²'.isdigit()
'12'.isdecimal()
'½'.isnumeric()
'abc'.islower()
'ABC'.isupper()
' '.isspace()
'Ab'.istitle()
'ab'.isidentifier()
'ab'.isprintable()
','.join(words)
','.join([])
','.join([1])
','.join({'a': 1, 'b': 2})
' x '.strip()
'xxaxx'.strip('x')
'xyaxy'.lstrip('xy')
'xyaxy'.rstrip('xy')
'  a'.lstrip() ~ '|'
' a '.strip(none)
'abc'.encode()
'aXbX'.translate({})
nested.get('b')
nested.get('z')
nested.get('z', 'd')
nested.get('z', default='d')
nested.keys()|list
nested.values()|list|length
nested.items()|list|length
nested|items|list|length
{'a': 1}.items()
{'a': 1}.keys()
{'a': 1}.copy()
nested.pop('a')
nested.update({'x': 1})
nested.setdefault('x', 1)
items.append(4)
items.index(1)
items.index(9)
items.count(1)
items.copy()
items.pop()
items.sort()
items.reverse()
items + [4]
words[::-1]
words[1:]
words[-1]
words[:-1]
'hello'[1:3]
'hello'[::-1]
'hello'[-1]
'hello'[10:]
'wörld'[1]
items|sort
items|sort(reverse=true)
words|sort
words|sort(case_sensitive=true)
messages|sort(attribute='role')|map(attribute='role')|list
items|max
items|min
items|sum
messages|sum(attribute='n')
messages|selectattr('n', 'defined')|map(attribute='role')|list
messages|selectattr('role', 'equalto', 'user')|list|length
messages|selectattr('role', 'in', ['user', 'system'])|map(attribute='content')|join
messages|rejectattr('role', '==', 'user')|map(attribute='role')|join(',')
messages|map(attribute='n', default=0)|list
words|map('lower')|list
words|map('replace', 'b', 'z')|list
words|select('in', ['A'])|list
items|reject('odd')|list
items|select('gt', 1)|list
items|first
items|last
[]|first is defined
[]|last is defined
words|reverse|list
'abc'|reverse
'abc'|list
'abc'|first
'abc'|last
'abc'|length
{'a': 1}|length
{'b': 1, 'a': 2}|dictsort
{'b': 1, 'a': 2}|dictsort(by='value')
{'b': 1, 'a': 2}|dictsort(reverse=true)
{'b': 1, 'a': 2}|list
[1, 1, 2]|unique|list
[1, 2, 3, 4, 5]|batch(2)|list
[1, 2, 3]|batch(2, 'x')|list
[1, 2, 3, 4, 5]|slice(2)|list
messages|groupby('role')|map(attribute='grouper')|list
messages|groupby('role')|map('first')|list
'a\\nb'|indent
'a\\nb'|indent(2, true)
'a\\n\\nb'|indent(2)
'a\\n\\nb'|indent(2, blank=true)
'a\\nb'|indent(width=2, first=true)
'a\\nb'|indent('> ')
'hello'|upper
'HELLO'|lower
'hello world'|title
'hELLO'|capitalize
' x '|trim
'xax'|trim('x')
'a b c'|wordcount
'a b'|urlencode
'<a>'|escape
'<a>'|e
'<a>'|safe
'<b>x</b>'|striptags
'hello world'|truncate(8)
'hello'|center(9)
1.5|round
2.5|round
2.567|round(2)
2.1|round(0, 'ceil')
3|round
-5|abs
5|string|length
'5' + 5
5 + 5.0
7 / 2
6 / 2
7 // 2
2 ** 10
'ab' * 3
[1] * 2
1 < 2 < 3
'a' < 'b'
'a' == 1
1 == 1.0
true == 1
none == false
'a' in 'abc'
'a' in {'a': 1}
1 in [1.0]
'x' not in words
true and 'x'
'' or 'y'
not ''
'y' if flag else 'n'
'y' if not flag
'a' if missing else 'b'
true
none
True
None
range(3)|list
range(1, 10, 3)|list
range(3)
dict(a=1, b='x')
dict({'a': 1}, b=2)
namespace(a=1).a
lipsum is defined
cycler('a', 'b').next()
joiner()()
flag is sameas true
1 is sameas true
3 is divisibleby 3
3 is odd
'a' is in ['a']
'a' is eq 'a'
'upper' is filter
'odd' is test
5 is lt 6
'abc' is lower
'ABC' is upper
messages[0]['role']
messages[0]['nope'] is undefined
messages|length > 1
messages[1:]|map(attribute='role')|list
messages[-1].role
messages[0].items()|list
messages[0].keys()|list
messages[0].role.upper()
messages[0]|attr('role') is defined
nested.b[4]
nested['b'][0]
'a' 'b'
"\\u00e9"
'\\x41'
'\\'
1_000
0x1f
0b11
(1, 2)[0]
[(1, 2)]|map('last')|list
words|map('upper')|join
strftime_now is defined
raise_exception('no')
'a'|unknown
'a' is unknown
'a'.unknown()
unknown_function()
""".strip("\n").split("\n")

TEMPLATES = [
    "a\r\nb\rc\nd",
    "{% if true %}\r\n  x\r\n{% endif %}\r\ny\r\n",
    "{{ 'a\r\nb'|length }}",
    "{{ text }}\r\n",
    "a\n",
    "a\n\n",
    "a\r\n",
    "  {% if true %}  \n  x\n  {%- endif %}\n  y",
    "  {%+ if true %}\n  x{% endif +%}\n  y",
    "  {# note #}\n  x {# note #}\n",
    "{%- set x = 1 -%}\n  {{ x }}\n  {{- x -}}  \n y",
    "{% raw %}{{ x }}{% endraw %}",
    "{% for m in messages %}{{ loop.index }}{{ loop.index0 }}{{ loop.first }}{{ loop.last }}{{ loop.length }}{{ loop.revindex }}{{ loop.revindex0 }};{% endfor %}",
    "{% for m in messages %}{{ loop.previtem.role if loop.previtem is defined }}>{{ loop.nextitem.role if loop.nextitem is defined }};{% endfor %}",
    "{% for m in messages %}{{ loop.cycle('a', 'b') }}{{ loop.changed(m.role) }}{% endfor %}",
    "{% for x in [] %}x{% else %}none{% endfor %}",
    "{% for x in missing %}x{% else %}none{% endfor %}",
    "{% for x in none %}x{% endfor %}",
    "{% for m in messages if m.role != 'user' %}{{ loop.index }}{{ m.role }}{% endfor %}",
    "{% for x in items %}{% if x == 1 %}{% continue %}{% endif %}{{ x }}{% endfor %}",
    "{% for x in items %}{% if x == 1 %}{% break %}{% endif %}{{ x }}{% endfor %}",
    "{% for k, v in nested.items() %}{{ k }}={{ v }};{% endfor %}",
    "{% for k, v in nested|items %}{{ k }};{% endfor %}",
    "{% for k, v in nested|dictsort %}{{ k }};{% endfor %}",
    "{% for k in nested %}{{ k }};{% endfor %}",
    "{% for c in 'abc' %}{{ c }}.{% endfor %}",
    "{% for a, b in [(1, 2), [3, 4]] %}{{ a + b }};{% endfor %}",
    "{% for r, g in messages|groupby('role') %}{{ r }}{{ g|length }};{% endfor %}",
    "{% set x = 1 %}{% for i in items %}{% set x = i %}{% endfor %}{{ x }}",
    "{% set ns = namespace(x=1) %}{% for i in items %}{% set ns.x = ns.x + i %}{% endfor %}{{ ns.x }}",
    "{% set ns = namespace() %}{% set ns.found = false %}{{ ns.found }}{{ ns.other is defined }}",
    "{% set a, b = 1, 2 %}{{ a }}{{ b }}",
    "{% set x %}a{{ 1 }}b{% endset %}{{ x|length }}{{ x is string }}",
    "{% set x | upper %}ab{% endset %}{{ x }}",
    "{% macro f(a, b='x') %}{{ a }}{{ b }}{% endmacro %}{{ f(1) }}{{ f(1, b=2) }}{{ f is callable }}",
    "{% macro f(x) %}{% if x is mapping %}{% for k, v in x|dictsort %}{{ k }}:{{ f(v) }}{% endfor %}{% else %}{{ x }}{% endif %}{% endmacro %}{{ f({'a': {'b': 1}}) }}",
    "{% macro f() %}[{{ caller() }}]{% endmacro %}{% call f() %}x{% endcall %}",
    "{% macro f() %}{{ varargs|length }}{{ kwargs|length }}{% endmacro %}{{ f() }}",
    "{% filter upper %}ab{% endfilter %}",
    "{% with x = 5 %}{{ x }}{% endwith %}{{ x is defined }}",
    "{% set j = joiner(', ') %}{% for x in items %}{{ j() }}{{ x }}{% endfor %}",
    "{% set j = joiner() %}{{ j() }}a{{ j() }}b{{ j() }}c",
    "{% set c = cycler('odd', 'even') %}{{ c.next() }}{{ c.next() }}{{ c.current }}{{ c.next() }}{% set _ = c.reset() %}{{ c.next() }}",
    "{% generation %}a{% endgeneration %}b",
    "{% if messages is iterable and messages is not mapping and messages is not string %}list{% endif %}",
    "{% if tools is iterable and tools | length > 0 %}tools{% else %}none{% endif %}",
    "{%- if null is iterable %}yes{% else %}no{% endif %}",
    "{% if not null is defined %}a{% elif null is none %}b{% endif %}",
    "{% set content = think %}{% if '</think>' in content %}{% set content = content.split('</think>')[-1].lstrip('\\n') %}{% endif %}{{ content }}",
    "{{ '%s' % 'a' }}{% set x = '%s-%s' % ('a', 1) %}{{ x }}{% if '%s' % 'b' == 'b' %}c{% endif %}",
    "50% of {{ '%d%%' % 50 }} % {# '%s' % x #}",
    "{% raw %}{{ '%s' % x }}{% endraw %}",
    "{{ '%s' % messages[0].get('role', '') | upper ~ '%' }}",
    "{{ \"it's %s\" % 'x' }}{{ 'say \\'%s\\'' % 'y' }}",
    "{{ '%s' %\n  'x' }}",
    "{{ ['%s' % 1, '%s' % (2,)] }}{{ {'a': '%s' % 'b'} }}",
    "{% for x in ['%s' % 1] %}{{ x }}{% endfor %}",
    "{{ messages|map(attribute='role')|map('upper')|join(',') }}",
    "{{- '<|im_start|>' + messages[0].role + '\\n' + messages[0].content|trim + '<|im_end|>\\n' }}",
    "{{ messages[0].role.split('y', 1)|join('|') }}{{ ' a  b '.split() | join('-') }}",
    "{% do 1 %}",
    "{% include 'x' %}",
    "{% if %}",
    "{{ a b }}",
    "{{ '{%' }}{{ '%}' }}",
    "{{ \"a\\\"b\" }}",
    "{{ '\\n'|length }}{{ '\\\\n'|length }}",
]


def environment():
    env = ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True, extensions=[Generation, jinja2.ext.loopcontrols])

    def tojson(x, ensure_ascii=False, indent=None, separators=None, sort_keys=False):
        return json.dumps(x, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)

    def raise_exception(message):
        raise jinja2.exceptions.TemplateError(message)

    env.filters["tojson"] = tojson
    env.globals["raise_exception"] = raise_exception
    env.globals["strftime_now"] = lambda format: "date"
    return env


class Generation(jinja2.ext.Extension):
    """`{% generation %}` as transformers has it: its content."""

    tags = {"generation"}

    def parse(self, parser):
        line = next(parser.stream).lineno
        body = parser.parse_statements(["name:endgeneration"], drop_needle=True)
        return jinja2.nodes.CallBlock(self.call_method("_content"), [], [], body).set_lineno(line)

    def _content(self, caller):
        return caller()


def render(source):
    try:
        return environment().from_string(source).render(**json.loads(json.dumps(VARIABLES)))
    except Exception:
        return None


def main():
    templates = [f"{{{{ {expression} }}}}" for expression in EXPRESSIONS]
    templates += [f"{{{{ ({subject}) is {test} }}}}" for subject in SUBJECTS for test in TESTS]
    templates += TEMPLATES
    rows = [[template, render(template)] for template in templates]
    lines = ",\n    ".join(json.dumps(row, ensure_ascii=False) for row in rows)
    TARGET.parent.mkdir(parents=True, exist_ok=True)
    TARGET.write_text(f'{{\n  "variables": {json.dumps(VARIABLES, ensure_ascii=False)},\n  "rows": [\n    {lines}\n  ]\n}}\n')


if __name__ == "__main__":
    main()
