// The demo's scale, and many real ones: lines such as "ST,GS,+00012.34kg".
//
//   ST stable, US unstable, OL overload    GS gross weight, NT net weight    sign, digits, unit
//
// Setting the point `tare` or `zero` to any value sends the scale's command for it.

function decodeUplink(input) {
  var line = String.fromCharCode.apply(null, input.bytes);
  var match = /^(ST|US|OL),(GS|NT),([+-]) *([0-9.]+) *([a-zA-Z]+)$/.exec(line);
  if (!match) {
    return { errors: ["not a line of this scale: " + line] };
  }
  if (match[1] === "OL") {
    return { errors: ["the scale is overloaded"] };
  }
  return {
    data: {
      weight: parseFloat(match[3] + match[4]),
      stable: match[1] === "ST",
      tared: match[2] === "NT",
    },
    units: { weight: match[5] },
  };
}

function encodeDownlink(input) {
  if ("tare" in input.data) {
    return { bytes: [0x54, 0x0d, 0x0a] }; // T
  }
  if ("zero" in input.data) {
    return { bytes: [0x5a, 0x0d, 0x0a] }; // Z
  }
  return { bytes: [], errors: ["this scale takes the commands tare and zero"] };
}
