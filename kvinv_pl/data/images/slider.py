"""A picture over another under a slider, in our own pages: left of the line is the source, right the edit.

An element of the class `compare` holds the source, the other picture with the class `edited`, and a range.
"""

STYLE = """
.compare { position: relative; line-height: 0; --at: 50% }
.compare .edited { position: absolute; inset: 0; width: 100%; height: 100%;
  clip-path: inset(0 0 0 var(--at)) }
.compare:has(input)::after { content: ""; position: absolute; top: 0; bottom: 0; left: var(--at); width: 2px;
  margin-left: -1px; background: #fff; box-shadow: 0 0 3px #000; pointer-events: none }
.compare input { position: absolute; inset: 0; width: 100%; height: 100%; margin: 0;
  opacity: 0; cursor: ew-resize }
.compare:focus-within { outline: 3px solid var(--accent, #0969da); outline-offset: 2px }
@media print {
  .compare input, .compare:has(input)::after { display: none } .compare .edited { clip-path: none }
}
"""
SCRIPT = """
addEventListener("input", event => {
  const place = event.target.closest(".compare");
  if (place) place.style.setProperty("--at", event.target.value + "%");
});
"""
SOURCE_SHOWN = "how much of the source is seen"
"""What a screen reader says of the range."""
