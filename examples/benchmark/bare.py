"""The ceiling: an epoll loop that sends canned bytes to whatever ends a head. Run: bare.py PORT"""
import select
import socket
import sys

ANSWER = (b"HTTP/1.1 200 OK\r\nContent-Length: 12\r\nContent-Type: text/html; charset=UTF-8\r\n"
          b"Date: Thu, 01 Jan 1970 00:00:00 GMT\r\nServer: bare\r\n\r\nHello World!")


def main():
    listener = socket.create_server(("127.0.0.1", int(sys.argv[1])), backlog=1024)
    poller = select.epoll()
    poller.register(listener, select.EPOLLIN)
    connections, heads = {}, {}  # by descriptor; heads holds those that came in part
    while True:
        for fd, _ in poller.poll():
            if fd == listener.fileno():
                conn, _ = listener.accept()
                connections[conn.fileno()] = conn
                poller.register(conn, select.EPOLLIN)
                continue
            try:
                data = connections[fd].recv(65536)
            except ConnectionError:
                data = b""
            head = heads.pop(fd, b"") + data
            if not data:
                connections.pop(fd).close()
            elif head.endswith(b"\r\n\r\n"):
                connections[fd].send(ANSWER)
            else:
                heads[fd] = head


if __name__ == "__main__":
    main()
