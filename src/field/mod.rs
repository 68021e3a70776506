//! Modbus buses, serial ports, plugin processes; codecs; readings to messages, commands to writes.
