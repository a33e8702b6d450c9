"""A ProxyCommand of ssh that sends slowly: slow_proxy.py PORT BYTES_A_SECOND FILE

FILE gets the number of bytes that were sent, of all calls together."""
import os
import socket
import sys
import threading
import time

line = socket.create_connection(("127.0.0.1", int(sys.argv[1])))
rate = int(sys.argv[2])


def back():
    while True:
        data = line.recv(65536)
        if not data: os._exit(0)
        os.write(1, data)


threading.Thread(target=back, daemon=True).start()
while True:
    data = os.read(0, 16384)
    if not data: break
    line.sendall(data)
    with open(sys.argv[3], "a+") as f:
        f.seek(0)
        sent = int(f.read() or 0) + len(data)
        f.truncate(0)
        f.write(str(sent))
    time.sleep(len(data) / rate)
