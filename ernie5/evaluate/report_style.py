"""Look of the report: one style sheet, light and dark, no font or script from elsewhere."""

STYLE = """
:root{--bg:#f5f6f8;--card:#fff;--ink:#16181d;--soft:#667085;--line:#e4e7ec;--c1:#4f6df5;--c2:#0fa47f;--c3:#e8862e;
--c4:#c2489b;--c5:#7c5cff;--c6:#8a94a6;--heat:#f0562b;--good:#0a8f63;--goodbg:#e3f6ee;--bad:#b4510f;--badbg:#fdf0e3;
--shadow:0 1px 2px rgba(16,24,40,.05),0 6px 20px -8px rgba(16,24,40,.10)}
@media(prefers-color-scheme:dark){:root{--bg:#0e1014;--card:#171a21;--ink:#e9ebf0;--soft:#98a2b3;--line:#272c36;
--c1:#7f97ff;--c2:#35c79f;--c3:#f3a45c;--c4:#e27cc0;--c5:#a08bff;--c6:#7d8798;--heat:#ff7a50;--good:#4cd6a4;
--goodbg:#11322a;--bad:#f5ae6e;--badbg:#37260f;--shadow:none}}
*{box-sizing:border-box}html{scroll-behavior:smooth}
body{margin:0;background:var(--bg);color:var(--ink);
font:15px/1.5 system-ui,-apple-system,"Segoe UI",Roboto,"Noto Sans",sans-serif;-webkit-font-smoothing:antialiased}
main{max-width:1180px;margin:0 auto;padding:0 24px 72px}
header{max-width:1180px;margin:0 auto;padding:44px 24px 8px}
h1{font-size:30px;line-height:1.15;letter-spacing:-.022em;margin:0 0 6px;font-weight:680}
h1 span{background:linear-gradient(96deg,var(--c1),var(--c5) 55%,var(--c4));-webkit-background-clip:text;
background-clip:text;color:transparent}
header p{margin:0;color:var(--soft);max-width:74ch}
nav{position:sticky;top:0;z-index:3;background:color-mix(in srgb,var(--bg) 86%,transparent);
backdrop-filter:blur(10px);border-bottom:1px solid var(--line);margin-top:20px}
nav div{max-width:1180px;margin:0 auto;padding:10px 24px;display:flex;gap:20px;flex-wrap:wrap;font-size:13.5px}
nav a{color:var(--soft);text-decoration:none}nav a:hover{color:var(--ink)}
section{margin-top:40px;scroll-margin-top:56px}
h2{font-size:20px;letter-spacing:-.012em;margin:0 0 3px;font-weight:650}
h3{font-size:13.5px;margin:0 0 10px;font-weight:620}
.lead{color:var(--soft);margin:0 0 16px;max-width:78ch;font-size:14px}
.grid{display:grid;gap:16px;grid-template-columns:repeat(auto-fill,minmax(340px,1fr))}
.grid.tight{grid-template-columns:repeat(auto-fill,minmax(168px,1fr))}
.grid.wide{grid-template-columns:repeat(auto-fill,minmax(258px,1fr))}
.grid.two{grid-template-columns:repeat(auto-fill,minmax(440px,1fr))}
.grid.tiny{grid-template-columns:repeat(auto-fill,minmax(200px,1fr))}
.card{background:var(--card);border:1px solid var(--line);border-radius:14px;padding:16px;box-shadow:var(--shadow);
min-width:0}
.kpis{display:grid;gap:12px;grid-template-columns:repeat(auto-fit,minmax(150px,1fr));margin-top:24px}
.kpi{background:var(--card);border:1px solid var(--line);border-radius:14px;padding:13px 16px;box-shadow:var(--shadow)}
.kpi b{display:block;font-size:22px;letter-spacing:-.02em;font-weight:660;font-variant-numeric:tabular-nums}
.kpi span{color:var(--soft);font-size:12.5px}
.top{display:flex;justify-content:space-between;align-items:flex-start;gap:10px}
.chip{font-size:11.5px;font-weight:640;padding:2px 9px;border-radius:99px;white-space:nowrap}
.chip.plain{color:var(--soft);border:1px solid var(--soft)}
.chip.good{color:var(--good);background:var(--goodbg)}.chip.bad{color:var(--bad);background:var(--badbg)}
.big{font-size:27px;font-weight:670;letter-spacing:-.025em;font-variant-numeric:tabular-nums;line-height:1.25}
.big small{font-size:13px;color:var(--soft);font-weight:500;letter-spacing:0}
.versus{display:grid;grid-template-columns:fit-content(44%) minmax(80px,1fr) auto;gap:6px 10px;align-items:center;
font-size:12.5px;color:var(--soft);margin-top:8px}
.versus i{display:block;height:8px;border-radius:5px;background:var(--c1);min-width:3px}
.versus .base i{background:var(--c6)}.versus div{background:color-mix(in srgb,var(--line) 55%,transparent);
border-radius:5px}.versus em{font-style:normal;font-variant-numeric:tabular-nums;color:var(--ink);text-align:right}
.note{font-size:12px;color:var(--soft);margin:9px 0 0}
svg{display:block;width:100%;height:auto}svg .grid{stroke:var(--line);stroke-width:1}
svg .tick{fill:var(--soft);font-size:10.5px;font-family:inherit}
svg .value{fill:var(--ink);font-size:11.5px;font-weight:600;font-family:inherit}
svg .line{fill:none;stroke-width:1.9;stroke-linejoin:round;stroke-linecap:round}
svg .raw{fill:none;stroke-width:1;opacity:.22}
.legend{display:flex;flex-wrap:wrap;gap:4px 16px;font-size:12.5px;color:var(--soft);margin-top:10px}
.legend em{font-style:normal;color:var(--ink);font-variant-numeric:tabular-nums}
.dot{display:inline-block;width:9px;height:9px;border-radius:3px;margin-right:6px}
.split{display:flex;height:22px;border-radius:8px;overflow:hidden;gap:2px}.split i{display:block;min-width:2px}
.pair{display:grid;grid-template-columns:1fr 1fr;gap:8px}
.pair figure,.one figure{margin:0}
img,video{display:block;width:100%;border-radius:9px;background:var(--bg);image-rendering:pixelated;aspect-ratio:1}
audio{width:100%;height:34px;display:block;margin:2px 0 6px}
figcaption{font-size:11px;color:var(--soft);margin-top:4px;text-align:center}
.prompt{font-size:13px;margin:10px 0 0;line-height:1.35;overflow-wrap:anywhere}
.tag{font-size:11px;color:var(--soft)}
.words{font-size:13px;margin:0;overflow-wrap:anywhere}.words b{font-weight:560;color:var(--soft);font-size:11.5px;
display:block;margin-top:8px}
.words.text{font-size:13.5px;line-height:1.55}
.words mark{background:color-mix(in srgb,var(--c1) 15%,transparent);color:inherit;border-radius:4px;padding:1px 3px}
h4{font-size:14px;margin:26px 0 10px;font-weight:620}
table{border-collapse:collapse;width:100%;font-size:12px;font-variant-numeric:tabular-nums}
td,th{padding:4px 4px;text-align:right;border-bottom:1px solid var(--line)}th{color:var(--soft);font-weight:560}
td:first-child,th:first-child{text-align:left}
details{background:var(--card);border:1px solid var(--line);border-radius:14px;padding:12px 16px}
summary{cursor:pointer;font-weight:600;font-size:13.5px}
pre{overflow:auto;font:12px/1.5 ui-monospace,SFMono-Regular,Menlo,Consolas,monospace;color:var(--soft)}
.empty{color:var(--soft);font-size:13px;margin:6px 0}
.grid.below{margin-top:16px}video{cursor:pointer}
.scroll{overflow-x:auto}
footer{color:var(--soft);font-size:12.5px;margin-top:44px}
@media(max-width:640px){.grid,.grid.two{grid-template-columns:1fr}.grid.tight{grid-template-columns:1fr 1fr}}
@media print{nav{display:none}.card{break-inside:avoid}}
"""
