"""The third step of TCP's handshake, where passt leaves it out.

passt of Debian 12 (2023-03-09) connects to a server in the guest by SYN, and holds that connection
for established once the guest has sent SYN,ACK: but it says so only with the first data that the
host's program has for the guest. A server that speaks first (SSH, SMTP, most databases) never gets
to see such a connection, and both sides wait. `acknowledgement` is what is missing. Where passt
sends it as well, the guest gets it twice, which TCP does not mind (RFC 9293, 3.10.7.4).
"""

import struct
from collections.abc import Sequence

from tinyvmm.views import size_of

SYN_ACK_LEN_MAX = 14 + 60 + 60  # Ethernet's header, the greatest of IPv4 and of TCP
_ETHERNET, _IPV4 = 14, 20
_ETHERTYPE_IPV4 = b"\x08\x00"
_PROTOCOL_TCP = 6
_DONT_FRAGMENT = 1 << 14
_HOPS = 64
_FIN, _SYN, _RST, _ACK = 1 << 0, 1 << 1, 1 << 2, 1 << 4
_WINDOW = 256  # what passt says: scaled by 2^8, as its SYN announced, it is 64 KiB

_ip = struct.Struct(">BBHHHBBH4s4s")
_tcp = struct.Struct(">HHIIBBHHH")


def acknowledgement(views: Sequence[memoryview]) -> bytes | None:
    """Return the frame that answers a SYN,ACK of the guest's; None for any other frame."""
    if size_of(views) > SYN_ACK_LEN_MAX:
        return None
    frame = b"".join(views)
    if frame[12:14] != _ETHERTYPE_IPV4 or len(frame) < _ETHERNET + _IPV4 + _tcp.size:
        return None
    start = _ETHERNET + 4 * (frame[_ETHERNET] & 0xF)
    if frame[_ETHERNET + 9] != _PROTOCOL_TCP or len(frame) < start + _tcp.size:
        return None
    server, client, sequence, expected, _, flags, *_ = _tcp.unpack_from(frame, start)
    if flags & (_FIN | _SYN | _RST | _ACK) != _SYN | _ACK:
        return None
    guest_ip, peer_ip = frame[26:30], frame[30:34]
    following = sequence + 1 & 0xFFFF_FFFF
    words = _tcp.size // 4 << 4
    segment = _tcp.pack(client, server, expected, following, words, _ACK, _WINDOW, 0, 0)
    pseudo_header = peer_ip + guest_ip + struct.pack(">HH", _PROTOCOL_TCP, len(segment))
    segment = _with_checksum(segment, 16, pseudo_header)
    length = _IPV4 + len(segment)
    packet = _ip.pack(
        0x45, 0, length, 0, _DONT_FRAGMENT, _HOPS, _PROTOCOL_TCP, 0, peer_ip, guest_ip
    )
    guest_mac, peer_mac = frame[6:12], frame[:6]
    return guest_mac + peer_mac + _ETHERTYPE_IPV4 + _with_checksum(packet, 10) + segment


def _with_checksum(data: bytes, at: int, before: bytes = b"") -> bytes:
    """Put the Internet checksum (RFC 1071) of `before` and `data` into bytes `at` of `data`."""
    total = sum(struct.unpack(f">{(len(before) + len(data)) // 2}H", before + data))
    while total >> 16:
        total = (total & 0xFFFF) + (total >> 16)
    return data[:at] + struct.pack(">H", ~total & 0xFFFF) + data[at + 2 :]
