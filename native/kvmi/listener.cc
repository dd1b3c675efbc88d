#include "listener.h"

#include <poll.h>
#include <sys/socket.h>
#include <sys/stat.h>
#include <sys/un.h>

#include <cerrno>
#include <cstdlib>
#include <cstring>

#include "../vmi/log.h"

namespace kvmi {
namespace {

UniqueFd newSocket() { return UniqueFd(socket(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC | SOCK_NONBLOCK, 0)); }

bool somebodyListens(const sockaddr_un &address) {
  const UniqueFd probe = newSocket();
  const auto *generic = reinterpret_cast<const sockaddr *>(&address);
  return connect(probe.get(), generic, sizeof address) == 0 || errno != ECONNREFUSED;
}

/** Removes what a dead program left behind, and nothing else. */
bool makeWay(const sockaddr_un &address) {
  struct stat status;
  if (lstat(address.sun_path, &status) != 0) return true;
  if (!S_ISSOCK(status.st_mode)) {
    vmi::complain("%s exists and is not a socket", address.sun_path);
    return false;
  }
  if (somebodyListens(address)) {
    vmi::complain("another program is waiting for the hypervisor on %s", address.sun_path);
    return false;
  }
  if (unlink(address.sun_path) != 0) {
    vmi::complain("the old socket %s cannot be removed: %s", address.sun_path, strerror(errno));
    return false;
  }
  return true;
}

}  // namespace

std::optional<Listener> Listener::open(const char *path) {
  sockaddr_un address{};
  address.sun_family = AF_UNIX;
  if (path == nullptr || path[0] == '\0' || strlen(path) >= sizeof address.sun_path) {
    vmi::complain("a socket's path has 1 to %zu characters", sizeof address.sun_path - 1);
    return std::nullopt;
  }
  if (atoi(path) > 0) {
    vmi::complain("%s begins with a number: libvmi takes that for a vsock port, and there is no vsock here", path);
    return std::nullopt;
  }
  strcpy(address.sun_path, path);
  if (!makeWay(address)) return std::nullopt;

  UniqueFd socket = newSocket();
  if (!socket || bind(socket.get(), reinterpret_cast<const sockaddr *>(&address), sizeof address) != 0) {
    vmi::complain("the socket %s cannot be made: %s", path, strerror(errno));
    return std::nullopt;
  }
  Listener listener(std::move(socket), path);
  // The hypervisor runs as a user of its own, and connecting takes write permission.
  if (chmod(path, 0666) != 0 || listen(listener.socket_.get(), 1) != 0) {
    vmi::complain("the socket %s cannot be opened to the hypervisor: %s", path, strerror(errno));
    return std::nullopt;
  }
  return listener;
}

Listener::~Listener() {
  if (socket_) unlink(path_.c_str());
}

UniqueFd Listener::accept(const Deadline &deadline) {
  while (!deadline.passed()) {
    pollfd waiting{socket_.get(), POLLIN, 0};
    const int ready = poll(&waiting, 1, deadline.remaining());
    if (ready == 0 || (ready < 0 && errno != EINTR)) break;
    UniqueFd connection(accept4(socket_.get(), nullptr, nullptr, SOCK_CLOEXEC | SOCK_NONBLOCK));
    if (connection) return connection;
  }
  return UniqueFd();
}

}  // namespace kvmi
