%% An Erlang node that finds its like by <app>.internal. GET / pings each of them and says, one a
%% line, name and pong or pang; then the nodes that it is connected to.
-module(peers).
-export([start/0]).

start() ->
    spawn(fun listen/0). % and not here: the socket is closed when who opened it ends

listen() ->
    {ok, Ip} = inet:parse_address(os:getenv("FLY_PRIVATE_IP")),
    {ok, Listener} = gen_tcp:listen(list_to_integer(os:getenv("PORT")),
                                    [binary, {ip, Ip}, {active, false}, {reuseaddr, true}, {packet, http_bin}]),
    io:format("~p answers~n", [node()]),
    accept(Listener).

accept(Listener) ->
    {ok, Socket} = gen_tcp:accept(Listener),
    {Pid, _} = spawn_monitor(fun() -> receive go -> answer(Socket) end end),
    ok = gen_tcp:controlling_process(Socket, Pid),
    Pid ! go,
    accept(Listener).

answer(Socket) ->
    ok = skip_headers(Socket),
    Body = iolist_to_binary([io_lib:format("~s ~s~n", [Node, net_adm:ping(Node)]) || Node <- found()] ++
                            [io_lib:format("connected ~s~n", [Node]) || Node <- nodes()]),
    ok = inet:setopts(Socket, [{packet, raw}]),
    gen_tcp:send(Socket, ["HTTP/1.1 200 OK\r\nconnection: close\r\ncontent-length: ",
                          integer_to_list(byte_size(Body)), "\r\n\r\n", Body]),
    gen_tcp:close(Socket).

skip_headers(Socket) ->
    case gen_tcp:recv(Socket, 0, 5000) of
        {ok, http_eoh} -> ok;
        {ok, _} -> skip_headers(Socket)
    end.

found() ->
    {ok, Addresses} = inet:getaddrs(os:getenv("FLY_APP_NAME") ++ ".internal", inet),
    Names = [list_to_atom("peer@" ++ inet:ntoa(Address)) || Address <- Addresses],
    lists:sort(lists:delete(node(), Names)).
