# What runs in the guest: a server whose answers depend on RAM that it filled before it was saved.
import http.server
import sys

salt, pages = int(sys.argv[1]), int(sys.argv[2])
MASK = (1 << 64) - 1


def mix(one, other):
    return ((one ^ other) * 0x9E3779B97F4A7C15 + 1) & MASK


block = bytearray(pages << 12)
for page in range(pages):
    block[page << 12:(page + 1) << 12] = mix(salt, page).to_bytes(8, "little") * 512
served = 0


class Handler(http.server.BaseHTTPRequestHandler):
    def do_GET(self):
        global served
        nonce, count = map(int, self.path[1:].split("/"))
        answer = at = nonce
        for turn in range(count):
            at = mix(at, turn)
            page = at % pages << 12
            answer = mix(answer, int.from_bytes(block[page:page + 8], "little"))
            if turn % 8 == 0:
                block[page + 2048] ^= 1
        served += 1
        self.send_response(200)
        self.end_headers()
        self.wfile.write(b"%d %d" % (answer, served))

    def log_message(self, *_):
        pass


http.server.ThreadingHTTPServer(("127.0.0.1", 8000), Handler).serve_forever()
