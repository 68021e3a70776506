// The demo's MQTT-SN sensor: five bytes, as battery-powered sensors pack what they measure.
//
//   0–1  temperature, signed, big byte first, 0.01 °C      3  battery voltage, 20 mV
//   2    relative humidity, 0.5 %                          4  flags: bit 0 is set while the door is open

function decodeUplink(input) {
  var bytes = input.bytes;
  if (bytes.length !== 5) {
    return { errors: ["expected 5 bytes, got " + bytes.length] };
  }
  var temperature = (bytes[0] << 8) | bytes[1];
  if (temperature > 0x7fff) {
    temperature -= 0x10000;
  }
  var battery = (bytes[3] * 20) / 1000;
  return {
    data: {
      temperature: temperature / 100,
      humidity: bytes[2] / 2,
      battery: battery,
      door_open: (bytes[4] & 1) === 1,
    },
    units: { temperature: "°C", humidity: "%", battery: "V" },
    warnings: battery < 2.4 ? ["the battery is low"] : [],
  };
}
