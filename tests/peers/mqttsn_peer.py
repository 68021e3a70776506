"""A small MQTT-SN 1.2 client, written from the specification and sharing nothing with the gateway's own code.

For what the published clients cannot do: sleep and wake, acknowledge every QoS, publish with QoS -1 through a forwarder,
repeat messages, move to another address. Only the standard library.
"""

import socket
import struct
import time

ADVERTISE, SEARCHGW, GWINFO, CONNECT, CONNACK = 0x00, 0x01, 0x02, 0x04, 0x05
WILLTOPICREQ, WILLTOPIC, WILLMSGREQ, WILLMSG = 0x06, 0x07, 0x08, 0x09
REGISTER, REGACK, PUBLISH, PUBACK, PUBCOMP, PUBREC, PUBREL = 0x0A, 0x0B, 0x0C, 0x0D, 0x0E, 0x0F, 0x10
SUBSCRIBE, SUBACK, UNSUBSCRIBE, UNSUBACK = 0x12, 0x13, 0x14, 0x15
PINGREQ, PINGRESP, DISCONNECT = 0x16, 0x17, 0x18
WILLTOPICUPD, WILLTOPICRESP, WILLMSGUPD, WILLMSGRESP, ENCAPSULATED = 0x1A, 0x1B, 0x1C, 0x1D, 0xFE

NORMAL, PREDEFINED, SHORT = 0, 1, 2
ACCEPTED = 0

PATIENCE = 10.0


class Unexpected(AssertionError):
    """The gateway said something else than the specification asks for."""


def frame(kind, body=b""):
    """A whole message: the long length from 256 octets on (5.2.1)."""
    if len(body) + 2 < 256:
        return bytes([len(body) + 2, kind]) + body
    return b"\x01" + struct.pack(">H", len(body) + 4) + bytes([kind]) + body


def parse(datagram):
    """Type and body of a message that must fill its datagram."""
    if datagram[0] == 1:
        (length,), header = struct.unpack(">H", datagram[1:3]), 3
    else:
        length, header = datagram[0], 1
    if length != len(datagram):
        raise Unexpected(f"length {length} in a datagram of {len(datagram)}: {datagram.hex()}")
    return datagram[header], datagram[header + 1:]


def flags(dup=False, qos=0, retain=False, will=False, clean=False, kind=NORMAL):
    return dup << 7 | (qos & 3) << 5 | retain << 4 | will << 3 | clean << 2 | kind


class Client:
    """One client. `node` puts it behind a forwarder (5.5)."""

    def __init__(self, port, client_id, node=None):
        self.gateway = ("127.0.0.1", port)
        self.client_id = client_id.encode()
        self.node = node
        self.last_msg_id = 0
        self.names = {}
        self.inbox = []
        """What was delivered: topic, payload, QoS, retain."""
        self.received = set()
        """MsgIds of QoS 2 messages that are not released yet."""
        self.move()

    def move(self):
        """Continues from another address, as after a router's restart."""
        self.socket = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
        self.socket.bind(("127.0.0.1", 0))

    def send(self, kind, body=b""):
        message = frame(kind, body)
        if self.node is not None:
            message = bytes([3 + len(self.node), ENCAPSULATED, 1]) + self.node + message
        self.socket.sendto(message, self.gateway)

    def receive(self, patience=PATIENCE):
        """The next message, or None after `patience`."""
        self.socket.settimeout(patience)
        try:
            datagram, _ = self.socket.recvfrom(65535)
        except TimeoutError:
            return None
        if self.node is not None:
            header = bytes([3 + len(self.node), ENCAPSULATED])
            if not datagram.startswith(header) or datagram[3:3 + len(self.node)] != self.node:
                raise Unexpected(f"not wrapped for {self.node.hex()}: {datagram.hex()}")
            datagram = datagram[3 + len(self.node):]
        return parse(datagram)

    def expect(self, kind, patience=PATIENCE):
        """Waits for a message of one type and serves what else comes in the meantime."""
        deadline = time.monotonic() + patience
        while True:
            got = self.receive(max(0.01, deadline - time.monotonic()))
            if got is None:
                raise Unexpected(f"no message of type {kind:#04x}")
            if got[0] == kind:
                return got[1]
            self.serve(*got)

    def serve(self, kind, body):
        if kind == REGISTER:
            topic_id, msg_id = struct.unpack(">HH", body[:4])
            self.names[NORMAL, topic_id] = body[4:].decode()
            self.send(REGACK, struct.pack(">HHB", topic_id, msg_id, ACCEPTED))
        elif kind == PUBLISH:
            self.deliver(body)
        elif kind == PUBREL:
            self.received.discard(body)
            self.send(PUBCOMP, body)
        else:
            raise Unexpected(f"message of type {kind:#04x}: {body.hex()}")

    def deliver(self, body):
        bits, topic_id, msg_id = struct.unpack(">BHH", body[:5])
        qos, kind = bits >> 5 & 3, bits & 3
        if kind == SHORT:
            name = body[1:3].decode()
        else:
            name = self.names.get((kind, topic_id))
        if name is None:
            self.send(PUBACK, struct.pack(">HHB", topic_id, msg_id, 2))
            return
        if qos == 2:
            fresh = body[3:5] not in self.received
            self.received.add(body[3:5])
            self.send(PUBREC, body[3:5])
        else:
            fresh = True
        if fresh:
            self.inbox.append((name, body[5:], qos, bool(bits & 0x10)))
        if qos == 1:
            self.send(PUBACK, struct.pack(">HHB", topic_id, msg_id, ACCEPTED))

    def pump(self, patience):
        """Serves whatever comes within `patience` seconds."""
        deadline = time.monotonic() + patience
        while (left := deadline - time.monotonic()) > 0:
            got = self.receive(left)
            if got is not None:
                self.serve(*got)

    def wait_for(self, count, patience=PATIENCE):
        """Serves until `count` messages were delivered, and takes them."""
        deadline = time.monotonic() + patience
        while len(self.inbox) < count:
            got = self.receive(max(0.01, deadline - time.monotonic()))
            if got is None:
                raise Unexpected(f"{len(self.inbox)} of {count} messages: {self.inbox}")
            self.serve(*got)
        taken, self.inbox = self.inbox[:count], self.inbox[count:]
        return taken

    def msg_id(self):
        self.last_msg_id = self.last_msg_id % 0xFFFF + 1
        return self.last_msg_id

    def connect(self, clean=True, keep_alive=60, will=None):
        """`will` is topic, payload, QoS and retain. Returns the return code."""
        head = struct.pack(">BBH", flags(will=will is not None, clean=clean), 1, keep_alive)
        self.send(CONNECT, head + self.client_id)
        if will is not None:
            topic, payload, qos, retain = will
            self.expect(WILLTOPICREQ)
            self.send(WILLTOPIC, bytes([flags(qos=qos, retain=retain)]) + topic.encode())
            self.expect(WILLMSGREQ)
            self.send(WILLMSG, payload)
        return self.expect(CONNACK)[0]

    def register(self, topic):
        msg_id = self.msg_id()
        self.send(REGISTER, struct.pack(">HH", 0, msg_id) + topic.encode())
        topic_id, answered, code = struct.unpack(">HHB", self.expect(REGACK))
        assert answered == msg_id
        if code == ACCEPTED:
            self.names[NORMAL, topic_id] = topic
        return topic_id, code

    def publish(self, topic_id, payload, qos=0, retain=False, kind=NORMAL, dup=False, msg_id=None):
        """Publishes and completes the exchange. Returns the return code of a PUBACK, None where there is none."""
        if qos in (1, 2) and msg_id is None:
            msg_id = self.msg_id()
        msg_id = msg_id or 0
        head = bytes([flags(dup=dup, qos=qos, retain=retain, kind=kind)]) + struct.pack(">HH", topic_id, msg_id)
        self.send(PUBLISH, head + payload)
        if qos == 1:
            answered_topic, answered, code = struct.unpack(">HHB", self.expect(PUBACK))
            assert (answered_topic, answered) == (topic_id, msg_id)
            return code
        if qos == 2:
            assert struct.unpack(">H", self.expect(PUBREC)) == (msg_id,)
            self.send(PUBREL, struct.pack(">H", msg_id))
            assert struct.unpack(">H", self.expect(PUBCOMP)) == (msg_id,)
            return ACCEPTED
        return None

    def subscribe(self, topic, qos=0, kind=NORMAL):
        """Returns granted QoS, topic id and return code."""
        msg_id = self.msg_id()
        name = topic.encode() if isinstance(topic, str) else struct.pack(">H", topic)
        self.send(SUBSCRIBE, bytes([flags(qos=qos, kind=kind)]) + struct.pack(">H", msg_id) + name)
        bits, topic_id, answered, code = struct.unpack(">BHHB", self.expect(SUBACK))
        assert answered == msg_id
        if code == ACCEPTED and topic_id and kind == NORMAL:
            self.names[NORMAL, topic_id] = topic
        return bits >> 5 & 3, topic_id, code

    def unsubscribe(self, topic, kind=NORMAL):
        msg_id = self.msg_id()
        name = topic.encode() if isinstance(topic, str) else struct.pack(">H", topic)
        self.send(UNSUBSCRIBE, bytes([flags(kind=kind)]) + struct.pack(">H", msg_id) + name)
        assert struct.unpack(">H", self.expect(UNSUBACK)) == (msg_id,)

    def ping(self):
        self.send(PINGREQ)
        assert self.expect(PINGRESP) == b""

    def sleep(self, seconds):
        self.send(DISCONNECT, struct.pack(">H", seconds))
        assert self.expect(DISCONNECT) == b""

    def wake(self):
        """Takes everything that was buffered and sleeps on. Returns it."""
        self.send(PINGREQ, self.client_id)
        assert self.expect(PINGRESP) == b""
        taken, self.inbox = self.inbox, []
        return taken

    def disconnect(self):
        self.send(DISCONNECT)
        assert self.expect(DISCONNECT) == b""


def search(port, alive=lambda: True, patience=3 * PATIENCE):
    """The id of the gateway on `port`, by SEARCHGW, while it is alive."""
    probe = Client(port, "")
    deadline = time.monotonic() + patience
    while alive() and time.monotonic() < deadline:
        probe.send(SEARCHGW, b"\0")
        try:
            got = probe.receive(0.2)
        except ConnectionError:
            got = None
        if got is not None and got[0] == GWINFO:
            return got[1][0]
    raise Unexpected("no gateway answers SEARCHGW")
