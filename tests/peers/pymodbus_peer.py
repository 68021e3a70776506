"""A pymodbus server: `pymodbus_peer.py tcp PORT` or `pymodbus_peer.py rtu PATH`. Unit 1, holding registers 0 to 99, coils 0 to 15."""

import asyncio
import struct
import sys
import warnings

from pymodbus import FramerType
from pymodbus.datastore import ModbusDeviceContext, ModbusSequentialDataBlock, ModbusServerContext
from pymodbus.server import StartAsyncSerialServer, StartAsyncTcpServer

warnings.simplefilter("ignore")
registers = [0] * 100
registers[0:2] = struct.unpack(">HH", struct.pack(">f", 21.25))
registers[2] = 0xFFFF
registers[10:12] = [0x0304, 0x0102]
# The blocks count from 1.
device = ModbusDeviceContext(hr=ModbusSequentialDataBlock(1, registers), co=ModbusSequentialDataBlock(1, [0] * 16))
server = ModbusServerContext(devices={1: device}, single=False)
kind, where = sys.argv[1:]
if kind == "tcp":
    asyncio.run(StartAsyncTcpServer(server, address=("127.0.0.1", int(where))))
else:
    asyncio.run(StartAsyncSerialServer(server, framer=FramerType.RTU, port=where, baudrate=9600))
