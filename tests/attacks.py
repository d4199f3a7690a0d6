"""Hostile programs for the sandbox, and an honest one.

Words in capitals stand for places of the test that runs them: PORT, CANARY, WRITABLE, PREFIX, FOLDER, PID, MARK.
"""

# Each defines f, which returns "done" only when the attack has had its effect; `secret` tests ask for a value that the
# code does not know.
ATTACKS = {
    "an infinite loop that ignores signals": """
        import signal
        for number in range(1, 65):
            try:
                signal.signal(number, signal.SIG_IGN)
            except (OSError, ValueError):
                pass
        while True:
            pass
        """,
    "4 GiB of memory": "def f(): return 'done' if bytearray(4 << 30) else ''",
    "4 GiB of shared memory": "import mmap\ndef f(): return 'done' if mmap.mmap(-1, 4 << 30) else ''",
    "a fork bomb": """
        import os
        while True:
            try:
                os.fork()
            except OSError:
                pass
        """,
    "a hundred processes": """
        import os, time
        def f():
            for _ in range(100):
                if os.fork() == 0:
                    time.sleep(60)
            return 'done'
        """,
    "a daemon by double fork that answers later": """
        import os, time
        if os.fork() == 0:
            os.setsid()
            if os.fork() == 0:
                time.sleep(1)
                for fd in range(3, 64):
                    try:
                        os.write(fd, b'ready\\n[["str",""],[["str","646f6e65"]]]')
                    except OSError:
                        pass
                time.sleep(600)
            os._exit(0)
        os._exit(0)
        """,
    "filling the disk": """
        import os
        def f():
            for number in range(40):
                with open(f'/tmp/{number}', 'wb') as out:
                    out.write(bytes(8 << 20))
            return 'done'
        """,
    "one large file": """
        def f():
            with open('/tmp/large', 'wb') as out:
                out.write(bytes(64 << 20))
            return 'done'
        """,
    "TCP over loopback": """
        import socket
        def f():
            socket.create_connection(('127.0.0.1', PORT), 1)
            return 'done'
        """,
    "an abstract unix socket": """
        import socket
        def f():
            socket.socket(socket.AF_UNIX).connect('\\0' + 'MARK')
            return 'done'
        """,
    "the network outside": """
        import socket
        def f():
            socket.socket(socket.AF_INET, socket.SOCK_DGRAM).connect(('192.0.2.1', 9))
            return 'done'
        """,
    "reading files of root and of this test": """
        import glob
        def f():
            found = [*glob.glob('/home/*/.*'), *glob.glob('/root/.ssh/*')]
            for path in ['CANARY', '/etc/shadow', '/etc/passwd', '/root/.bashrc', '/proc/1/environ', *found]:
                try:
                    if open(path, 'rb').read():
                        return 'done'
                except OSError:
                    pass
        """,
    "killing all processes": "import os\ndef f():\n    os.kill(-1, 9)\n    return 'done'",
    "killing this test": "import os\ndef f():\n    os.kill(PID, 9)\n    return 'done'",
    "killing the first process": """
        import os
        def f():
            for number in (9, 15, 14, 2, 1, 19):
                os.kill(1, number)
        """,
    "a flood of output": "while True:\n    print('x' * 100_000)",
    "a flood on every descriptor": """
        import os
        while True:
            for fd in range(64):
                try:
                    os.write(fd, b'x' * 100_000)
                except OSError:
                    pass
        """,
    "a large value": "def f(): return 'done' * 100_000",
    "a segfault": "import ctypes\nctypes.string_at(0)",
    "abort": "import os\nos.abort()",
    "sys.exit(0)": "import sys\nsys.exit(0)",
    "sys.exit(0) in the function": "import sys\ndef f(): sys.exit(0)",
    "os._exit(0)": "import os\nos._exit(0)",
    "os._exit(0) in the function": "import os\ndef f(): os._exit(0)",
    "an exit handler": "import atexit, os\natexit.register(lambda: os.write(1, b'done'))\nraise SystemExit",
    "patched builtins": """
        import builtins, sys
        class Never(BaseException): pass
        builtins.AssertionError = Never
        builtins.bool = builtins.all = builtins.eval = builtins.compile = lambda *a, **k: True
        builtins.repr = lambda value: 'True'
        def f(): return True
        """,
    "a patched harness": """
        import sys
        frame = sys._getframe()
        while frame:
            frame.f_globals['encode_value'] = lambda *a, **k: ['const', 'True']
            frame.f_globals['run_steps'] = lambda *a: [['str', ''], [['const', 'True']]]
            frame = frame.f_back
        def f(): return True
        """,
    "an __eq__ that is always true": """
        class A:
            __eq__ = lambda self, other: True
            __ne__ = lambda self, other: False
        def f(): return A()
        """,
    "an int that equals all": """
        class A(int):
            __eq__ = lambda self, other: True
            __hash__ = int.__hash__
        def f(): return A(3)
        """,
    "a thousand threads": """
        import threading, time
        def f():
            for _ in range(1000):
                threading.Thread(target=time.sleep, args=(60,), daemon=True).start()
            return 'done'
        """,
    "recursion without end": "import sys\nsys.setrecursionlimit(10**9)\ndef f(n=0): return f(n + 1)",
    "nested source": "f = " + "(" * 50_000,
    "writing to the host": """
        def f():
            new = ['/', '/usr', '/usr/lib', '/var/tmp', '/dev', '/home', '/root', 'PREFIX', 'FOLDER']
            for path in ['WRITABLE', *(f'{folder}/MARK' for folder in new)]:
                try:
                    with open(path, 'a') as out:
                        out.write('x')
                    return 'done'
                except OSError:
                    pass
        """,
    "a name in /tmp that the host would see": """
        def f():
            open('/tmp/MARK', 'w').write('x')
            open('/dev/shm/MARK', 'w').write('x')
        """,
    "changing memory through /proc": "def f():\n    open('/proc/self/mem', 'r+b')\n    return 'done'",
    "new namespaces": """
        import ctypes
        def f():
            libc = ctypes.CDLL(None)
            unshared = libc.unshare(0x10000000), libc.unshare(0x00020000)
            mounted = libc.mount(b'x', b'/tmp', b'tmpfs', 0, None), libc.umount2(b'/usr', 2)
            return 'done' if 0 in (*unshared, *mounted) else ''
        """,
    "out of the changed root": """
        import os
        def f():
            os.mkdir('/tmp/x')
            os.chroot('/tmp/x')
            return 'done'
        """,
    "device nodes": """
        import os, stat
        def f():
            os.mknod('/tmp/disk', 0o666 | stat.S_IFBLK, os.makedev(254, 0))
            return 'done'
        """,
    "System V shared memory": """
        import ctypes
        def f():
            libc = ctypes.CDLL(None)
            libc.shmat.restype = ctypes.c_void_p
            held = [libc.shmget(0, 128 << 20, 0o1600) for _ in range(3)]
            for segment in held:  # each is filled, and stays when it is detached
                place = libc.shmat(segment, None, 0)
                ctypes.memset(place, 1, 128 << 20)
                libc.shmdt(ctypes.c_void_p(place))
            return 'done'
        """,
    "System V messages": "import ctypes\ndef f(): return 'done' if ctypes.CDLL(None).msgget(0, 0o1600) >= 0 else ''",
    "System V semaphores": """
        import ctypes
        def f(): return 'done' if ctypes.CDLL(None).semget(0, 9, 0o1600) >= 0 else ''
        """,
    "files in memory alone": """
        import os
        def f():
            held = [os.memfd_create(str(number)) for number in range(32)]
            for number in held:
                os.write(number, bytes(8 << 20))
            return 'done'
        """,
    "io_uring": "import ctypes\ndef f(): return 'done' if ctypes.CDLL(None).syscall(425, 1, bytes(256)) >= 0 else ''",
    "a key that the kernel keeps": """
        import ctypes, os
        def f():
            add, control = {'x86_64': (248, 250), 'aarch64': (217, 219)}[os.uname().machine]
            kept = ctypes.CDLL(None).syscall(add, b'user', b'MARK', b'done', 4, -4)
            found = ctypes.CDLL(None).syscall(control, 0, -4, 1)  # the keyring of all processes of this user id
            return 'done' if max(kept, found) >= 0 else ''
        """,
    "page faults of its own": """
        import ctypes, os
        def f():
            number = {'x86_64': 323, 'aarch64': 282}[os.uname().machine]
            return 'done' if ctypes.CDLL(None).syscall(number, 1) >= 0 else ''  # 1: UFFD_USER_MODE_ONLY
        """,
    "a VM socket": "import socket\ndef f(): return 'done' if socket.socket(40, socket.SOCK_STREAM) else ''",
    "a netlink socket": "import socket\ndef f(): return 'done' if socket.socket(16, socket.SOCK_RAW) else ''",
    "secrets of the environment": "import os\ndef f(): return 'done' if 'PI_RAY_TEST_SECRET' in os.environ else ''",
    "raising its own limits": """
        import resource
        def f():
            resource.setrlimit(resource.RLIMIT_AS, (-1, -1))
            return 'done'
        """,
    "looking for the expected value": """
        import gc, sys
        SEEN = []
        def search(value, depth):
            if type(value) is int and value % 9973 == 9087:
                SEEN.append(value)
            if type(value) is str and 'assert' in value and '9087' in value:
                SEEN.append(value)
            if depth and isinstance(value, (list, tuple, set)):
                for item in list(value):
                    search(item, depth - 1)
            elif depth and isinstance(value, dict):
                for item in list(value.values()):
                    search(item, depth - 1)
        def f():
            frame = sys._getframe()
            while frame:
                search({**frame.f_locals, **frame.f_globals}, 3)
                frame = frame.f_back
            for value in gc.get_objects():
                search(value, 1)
            search([sys.argv, sys.orig_argv, sys.stdin.read()], 3)
            return max((value for value in SEEN if type(value) is int), default=len(SEEN))
        """,
    "a forged answer": """
        import os
        for fd in range(3, 64):
            try:
                os.write(fd, b'[["str",""],[["const","True"]]]')
            except OSError:
                pass
        os._exit(0)
        """,
}
HONEST = """
    import collections, functools, heapq, itertools, math, random, re, string, sys, tempfile, threading
    print('hello', file=sys.stderr)
    done = []
    thread = threading.Thread(target=done.append, args=(1,))
    thread.start()
    thread.join()
    with tempfile.NamedTemporaryFile('w+') as out:
        print('x', file=out)
    def f():
        return {'sum': sum(done), 'pi': round(math.pi, 2), 'words': re.findall('a+', 'aabaa')}
    """
