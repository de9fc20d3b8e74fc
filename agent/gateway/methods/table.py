"""Table of the JSON-RPC methods: name -> type of the parameters, handler. A new method is one row here."""

from __future__ import annotations

from agent.gateway.jsonrpc.dispatch import Method, MethodTable
from agent.gateway.methods import deno, file_io, files, glob, network, open_files, processes, walk
from agent.gateway.methods.params import network_params, open_file_params, path_params, process_params
from agent.gateway.methods.params.common import NoParams

METHODS: MethodTable = {
    # paths
    "stat": Method(path_params.PathOnly, files.stat_file),
    "lstat": Method(path_params.PathOnly, files.lstat_file),
    "readDir": Method(path_params.PathOnly, files.read_dir),
    "readLink": Method(path_params.PathOnly, files.read_link),
    "realPath": Method(path_params.PathOnly, files.real_path_of),
    "remove": Method(path_params.Remove, files.remove),
    "mkdir": Method(path_params.Mkdir, files.mkdir),
    "rename": Method(path_params.Rename, files.rename),
    "chmod": Method(path_params.Chmod, files.chmod),
    "chown": Method(path_params.Chown, files.chown),
    "copyFile": Method(path_params.CopyFile, files.copy_file),
    "link": Method(path_params.MakeLink, files.link),
    "symlink": Method(path_params.MakeLink, files.symlink),
    "makeTempDir": Method(path_params.Temp, files.make_temp_dir),
    "makeTempFile": Method(path_params.Temp, files.make_temp_file),
    "truncate": Method(path_params.Truncate, files.truncate),
    "umask": Method(path_params.Umask, files.umask),
    "utime": Method(path_params.Utime, files.utime),
    "walk": Method(path_params.Walk, walk.walk),
    "expandGlob": Method(path_params.Glob, glob.expand_glob),
    # whole files
    "readFile": Method(path_params.Read, file_io.read_file),
    "readTextFile": Method(path_params.Read, file_io.read_text_file),
    "writeFile": Method(path_params.Write, file_io.write_file),
    "writeTextFile": Method(path_params.WriteText, file_io.write_text_file),
    # open files
    "open": Method(open_file_params.Open, open_files.open_path),
    "create": Method(path_params.PathOnly, open_files.create),
    "fileRead": Method(open_file_params.HandleRead, open_files.read),
    "fileWrite": Method(open_file_params.HandleWrite, open_files.write),
    "fileSeek": Method(open_file_params.HandleSeek, open_files.seek),
    "fileStat": Method(open_file_params.Handle, open_files.stat),
    "fileTruncate": Method(open_file_params.HandleTruncate, open_files.truncate),
    "fileSync": Method(open_file_params.Handle, open_files.sync),
    "fileSyncData": Method(open_file_params.Handle, open_files.sync_data),
    "fileLock": Method(open_file_params.HandleLock, open_files.lock),
    "fileUnlock": Method(open_file_params.Handle, open_files.unlock),
    "fileUtime": Method(open_file_params.HandleUtime, open_files.utime),
    "fileClose": Method(open_file_params.Handle, open_files.close),
    # processes and environment
    "spawn": Method(process_params.Spawn, processes.spawn),
    "processWait": Method(process_params.Pid, processes.wait),
    "processKill": Method(process_params.Kill, processes.kill),
    "abort": Method(process_params.Abort, processes.abort),
    "envGet": Method(process_params.EnvKey, processes.env_get),
    "envToObject": Method(NoParams, processes.env_to_object),
    "envSet": Method(process_params.EnvKeyValue, processes.env_set),
    "envDelete": Method(process_params.EnvKey, processes.env_delete),
    # Deno and code-server
    "spawnDeno": Method(process_params.SpawnDeno, deno.spawn_deno),
    "denoHttpWait": Method(process_params.Pid, deno.http_wait),
    "spawnDenoRepl": Method(process_params.SpawnRepl, deno.spawn_repl),
    "denoReplEval": Method(process_params.ReplEval, deno.repl_eval),
    "denoReplCall": Method(process_params.ReplCall, deno.repl_call),
    "denoReplClose": Method(process_params.Pid, deno.repl_close),
    "vscode": Method(process_params.Vscode, deno.vscode),
    # network
    "fetch": Method(network_params.Fetch, network.fetch),
    "exposeHttp": Method(network_params.Expose, network.expose_http),
}
