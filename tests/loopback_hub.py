"""A Hub on this machine that speaks the protocol which the real ``huggingface_hub`` client speaks to the real Hub.

Two servers, because the real one sends large files from another host: one for pages and the API, one for large files.
Only the standard library is used, so that it can start before the client reads its environment.
"""
from __future__ import annotations

import base64
import hashlib
import itertools
import json
import re
import threading
from collections.abc import Callable
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import unquote, urlsplit

TOKEN = 'hf_loopback'
LARGE = '.safetensors'
COUNTER = itertools.count()


class Repository:
    """Commits, each all of its files, and names that lead to them."""

    def __init__(self):
        self.commits: dict[str, dict[str, bytes]] = {}
        self.refs: dict[str, str] = {}
        self.tags: dict[str, str] = {}

    def commit(self, files: dict[str, bytes]) -> str:
        before = self.commits.get(self.refs.get('main', ''), {})
        number = hashlib.sha1(str(next(COUNTER)).encode()).hexdigest()  # no two of a session, for the client's cache
        self.commits[number] = {**before, **files}
        self.refs['main'] = number
        return number

    def resolve(self, revision: str) -> str | None:
        number = self.refs.get(revision) or self.tags.get(revision) or revision
        return number if number in self.commits else None


class LoopbackHub:
    """The two servers and what they hold.

    A fault is a function of the handler that returns True once it has answered. `faults` has them by place: ``'head'``
    and ``'get'`` of the Hub, ``'large'`` of the other host, ``'api'``; each is used for one request.
    """

    def __init__(self):
        self.repositories: dict[str, Repository] = {}
        self.objects: dict[str, bytes] = {}
        self.faults: dict[str, list[Callable[[BaseHTTPRequestHandler], bool]]] = {}
        self.requests: list[tuple[str, str]] = []
        self.ranges: list[int] = []  # where the client went on with a file
        self.released = threading.Event()  # ends every answer that a test has let hang
        self.servers = [ThreadingHTTPServer(('127.0.0.1', 0), handler) for handler in (_Pages, _Large)]
        for server in self.servers:
            server.daemon_threads = True
            server.hub = self
            threading.Thread(target=server.serve_forever, kwargs={'poll_interval': 0.05}, daemon=True).start()
        self.endpoint, self.storage = (f'http://127.0.0.1:{server.server_port}' for server in self.servers)

    def reset(self) -> None:
        self.released.set()
        self.released = threading.Event()
        for store in (self.repositories, self.objects, self.faults, self.requests, self.ranges):
            store.clear()

    def put(self, name: str, files: dict[str, bytes]) -> str:
        """A new commit of a repository, which is created if need be."""
        return self.repositories.setdefault(name, Repository()).commit(files)

    def fail(self, place: str, fault: Callable[[BaseHTTPRequestHandler], bool], times: int = 1) -> None:
        self.faults.setdefault(place, []).extend([fault] * times)

    def count(self, method: str, part: str) -> int:
        return sum(m == method and part in path for m, path in self.requests)


# -- faults ------------------------------------------------------------------------------------------------------------


def status(number: int, code: str = '', **headers: str) -> Callable[[BaseHTTPRequestHandler], bool]:
    """Answer with an error; `code` is what the Hub calls it."""
    def fault(handler) -> bool:
        handler.answer(number, headers={**({'X-Error-Code': code} if code else {}), **headers})
        return True
    return fault


def hang(handler) -> bool:
    """Accept the request and say nothing until the test ends."""
    handler.server.hub.released.wait(30)
    handler.close_connection = True
    return True


def cut(handler) -> bool:
    """Send half of the file under the headers of the whole, then close the connection."""
    data = handler.wanted()
    handler.send_response(200)
    handler.send_header('Content-Length', str(len(data)))
    handler.end_headers()
    handler.wfile.write(data[:len(data) // 2])
    handler.wfile.flush()
    handler.close_connection = True
    return True


def sending(change: Callable[[bytes], bytes]) -> Callable[[BaseHTTPRequestHandler], bool]:
    """Send other bytes than those asked for, as a whole and successful answer."""
    def fault(handler) -> bool:
        handler.answer(200, change(handler.wanted()))
        return True
    return fault


# -- servers -----------------------------------------------------------------------------------------------------------


class _Handler(BaseHTTPRequestHandler):
    protocol_version = 'HTTP/1.1'

    def log_message(self, *args) -> None:
        pass

    def answer(self, number: int, body: bytes | dict = b'', headers: dict[str, str] | None = None) -> None:
        if isinstance(body, dict):
            body = json.dumps(body).encode()
        self.send_response(number)
        for name, value in (headers or {}).items():
            self.send_header(name, value)
        if 'Content-Length' not in (headers or {}):
            self.send_header('Content-Length', str(len(body)))
        self.end_headers()
        if self.command != 'HEAD':
            self.wfile.write(body)

    def body(self) -> bytes:
        return self.rfile.read(int(self.headers.get('Content-Length', 0)))

    def faulty(self, place: str) -> bool:
        faults = self.server.hub.faults.get(place)
        return bool(faults) and faults.pop(0)(self)

    def handle_one_request(self) -> None:
        try:
            super().handle_one_request()
        except (BrokenPipeError, ConnectionResetError):
            self.close_connection = True

    def parse_request(self) -> bool:
        good = super().parse_request()
        if good:
            self.server.hub.requests.append((self.command, self.path))
        return good


class _Large(_Handler):
    """The host of large files: PUT from the client, GET with ranges."""

    def wanted(self) -> bytes:
        return self.server.hub.objects[self.path.rsplit('/', 1)[1]]

    def do_GET(self) -> None:
        if self.faulty('large'):
            return
        data = self.wanted()
        match = re.match(r'bytes=(\d+)-', self.headers.get('Range', ''))
        if match:
            start = int(match[1])
            self.server.hub.ranges.append(start)
            self.answer(206, data[start:], {'Content-Range': f'bytes {start}-{len(data) - 1}/{len(data)}'})
        else:
            self.answer(200, data)

    def do_PUT(self) -> None:
        data = self.body()
        oid = self.path.rsplit('/', 1)[1]
        if hashlib.sha256(data).hexdigest() != oid:
            self.answer(400)
            return
        self.server.hub.objects[oid] = data
        self.answer(200)


class _Pages(_Handler):
    """The Hub itself."""

    def refuse(self, number: int, code: str, message: str = '') -> None:
        self.answer(number, {'error': message or code}, {'X-Error-Code': code, 'X-Error-Message': message or code})

    def allowed(self) -> bool:
        if self.headers.get('Authorization') == f'Bearer {TOKEN}':
            return True
        self.refuse(401, '', 'Invalid credentials in Authorization header')
        return False

    # files

    def resolve(self) -> None:
        hub = self.server.hub
        match = re.fullmatch(r'/([^/]+/[^/]+)/resolve/([^/]+)/(.+)', unquote(urlsplit(self.path).path))
        if match is None:
            self.refuse(404, 'RepoNotFound')
            return
        name, revision, path = match.groups()
        repository = hub.repositories.get(name)
        if repository is None:
            self.refuse(404, 'RepoNotFound')
            return
        commit = repository.resolve(revision)
        if commit is None:
            self.refuse(404, 'RevisionNotFound')
            return
        if path not in repository.commits[commit]:
            self.answer(404, headers={'X-Error-Code': 'EntryNotFound', 'X-Repo-Commit': commit})
            return
        data = repository.commits[commit][path]
        if path.endswith(LARGE):
            oid = hashlib.sha256(data).hexdigest()
            hub.objects[oid] = data
            self.answer(302, headers={'Location': f'{hub.storage}/objects/{oid}', 'X-Repo-Commit': commit,
                                      'X-Linked-Etag': f'"{oid}"', 'X-Linked-Size': str(len(data))})
        else:
            etag = hashlib.sha1(b'blob %d\0' % len(data) + data).hexdigest()
            self.answer(200, data, {'ETag': f'"{etag}"', 'X-Repo-Commit': commit, 'Content-Length': str(len(data))})

    def do_HEAD(self) -> None:
        if not self.faulty('head'):
            self.resolve()

    def do_GET(self) -> None:
        hub = self.server.hub
        match = re.fullmatch(r'/api/models/([^/]+/[^/]+)/(refs|revision/main)', urlsplit(self.path).path)
        if match is None:
            if not self.faulty('get'):
                self.resolve()
            return
        repository = hub.repositories[match[1]]
        if match[2] == 'refs':
            self.answer(200, {'branches': [{'name': n, 'ref': f'refs/heads/{n}', 'targetCommit': c}
                                           for n, c in repository.refs.items()],
                              'tags': [{'name': n, 'ref': f'refs/tags/{n}', 'targetCommit': c}
                                       for n, c in repository.tags.items()], 'converts': []})
        else:
            self.answer(200, {'id': match[1], 'sha': repository.refs['main'], 'siblings': [], 'tags': []})

    # uploads

    def do_POST(self) -> None:
        path = unquote(urlsplit(self.path).path)
        data = self.body()
        if self.faulty('api') or not self.allowed():
            return
        for pattern, method in (
                (r'/api/repos/create', self.create), (r'/api/validate-yaml', self.validate),
                (r'/api/models/([^/]+/[^/]+)/preupload/main', self.preupload),
                (r'/([^/]+/[^/]+)\.git/info/lfs/objects/batch', self.batch), (r'/verify/(\w+)', self.verify),
                (r'/api/models/([^/]+/[^/]+)/commit/main', self.commit),
                (r'/api/models/([^/]+/[^/]+)/tag/(\w+)', self.tag),
        ):
            match = re.fullmatch(pattern, path)
            if match:
                method(data, *match.groups())
                return
        self.refuse(404, 'NoSuchRoute', path)

    def do_DELETE(self) -> None:
        match = re.fullmatch(r'/api/models/([^/]+/[^/]+)/tag/(.+)', unquote(urlsplit(self.path).path))
        if self.allowed():
            del self.server.hub.repositories[match[1]].tags[match[2]]
            self.answer(200, {})

    def create(self, data: bytes) -> None:
        hub, wanted = self.server.hub, json.loads(data)
        name = f'{wanted.get("organization") or "me"}/{wanted["name"]}'
        exists = name in hub.repositories
        if not exists:
            hub.put(name, {'.gitattributes': b'*.safetensors filter=lfs diff=lfs merge=lfs -text\n'})
        self.answer(409 if exists else 200, {'url': f'{hub.endpoint}/{name}', 'name': name})

    def validate(self, data: bytes) -> None:
        good = json.loads(data)['content'].startswith('---\n')
        self.answer(200 if good else 400, {'errors': [] if good else [{'message': 'no metadata'}], 'warnings': []})

    def preupload(self, data: bytes, name: str) -> None:
        repository = self.server.hub.repositories[name]
        now = repository.commits[repository.refs['main']]
        files = []
        for file in json.loads(data)['files']:
            path, large = file['path'], file['path'].endswith(LARGE)
            oid = None
            if path in now:
                content = now[path]
                oid = (hashlib.sha256(content) if large else
                       hashlib.sha1(b'blob %d\0' % len(content) + content)).hexdigest()
            files.append({'path': path, 'uploadMode': 'lfs' if large else 'regular', 'shouldIgnore': False, 'oid': oid})
        self.answer(200, {'files': files})

    def batch(self, data: bytes, name: str) -> None:
        hub = self.server.hub
        self.answer(200, {'transfer': 'basic', 'objects': [
            {'oid': o['oid'], 'size': o['size'], 'actions': {
                'upload': {'href': f'{hub.storage}/objects/{o["oid"]}'},
                'verify': {'href': f'{hub.endpoint}/verify/{o["oid"]}'}}} for o in json.loads(data)['objects']]})

    def verify(self, data: bytes, oid: str) -> None:
        known = self.server.hub.objects.get(oid)
        self.answer(200 if known is not None and len(known) == json.loads(data)['size'] else 404, {})

    def commit(self, data: bytes, name: str) -> None:
        hub, files = self.server.hub, {}
        for line in data.splitlines():
            item = json.loads(line)
            value = item['value']
            if item['key'] == 'file':
                files[value['path']] = base64.b64decode(value['content'])
            elif item['key'] == 'lfsFile':
                files[value['path']] = hub.objects[value['oid']]
        number = hub.put(name, files)
        self.answer(200, {'commitOid': number, 'commitUrl': f'{hub.endpoint}/{name}/commit/{number}',
                          'success': True})

    def tag(self, data: bytes, name: str, revision: str) -> None:
        repository, tag = self.server.hub.repositories[name], json.loads(data)['tag']
        exists = tag in repository.tags
        if not exists:
            repository.tags[tag] = repository.resolve(revision)
        self.answer(409 if exists else 200, {})
