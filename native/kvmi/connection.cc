#include "connection.h"

#include <poll.h>
#include <sys/socket.h>

#include <cerrno>
#include <cstdarg>
#include <cstdio>
#include <cstring>

#include "../vmi/log.h"

namespace kvmi {
namespace {

constexpr uint32_t kReplyTimeoutMs = 10'000;
constexpr size_t kReceiveBuffer = 64 * 1024;
static_assert(kReceiveBuffer >= sizeof(wire::Header) + wire::kMaxBody);

/** The least that an event's own part holds. */
size_t specificSize(wire::EventId id) {
  switch (id) {
    case wire::EventId::kControlRegister:
    case wire::EventId::kMsr:
      return sizeof(wire::RegisterWrite);
    case wire::EventId::kPageFault:
      return sizeof(wire::PageFault);
    case wire::EventId::kSingleStep:
      return sizeof(wire::SingleStep);
    default:
      return 0;
  }
}

}  // namespace

Connection::Connection(UniqueFd socket) : socket_(std::move(socket)), incoming_(kReceiveBuffer) {}

std::unique_ptr<Connection> Connection::establish(UniqueFd socket, const Deadline &deadline) {
  std::unique_ptr<Connection> connection(new Connection(std::move(socket)));
  if (!connection->greet(deadline) || !connection->checkVersion(deadline)) return nullptr;
  return connection;
}

bool Connection::greet(const Deadline &deadline) {
  uint32_t size;
  while (tail_ - head_ < sizeof size)
    if (receive(deadline) != Received::kData) return die("the hypervisor connected but sent no greeting");
  memcpy(&size, &incoming_[head_], sizeof size);
  if (size < wire::kMinGreeting || size > wire::kMaxGreeting) return die("a greeting of %u bytes", size);

  for (size_t left = size; left > 0;) {
    if (head_ == tail_ && receive(deadline) != Received::kData) return die("the hypervisor's greeting is incomplete");
    const size_t piece = std::min(left, tail_ - head_);
    head_ += piece;
    left -= piece;
  }

  wire::GreetingReply reply{};
  reply.size = sizeof reply;
  const auto *bytes = reinterpret_cast<const uint8_t *>(&reply);
  outgoing_.assign(bytes, bytes + sizeof reply);
  return send();
}

bool Connection::checkVersion(const Deadline &deadline) {
  wire::Version version;
  if (!request(deadline, wire::MessageId::kGetVersion, {}, &version, sizeof version))
    return die("the hypervisor did not tell its KVMI version");
  if (version.version < wire::kMinVersion) return die("KVMI version %u is not supported", version.version);
  return true;
}

bool Connection::request(wire::MessageId id, std::initializer_list<Bytes> body, void *reply, size_t replySize) {
  return request(Deadline(kReplyTimeoutMs), id, body, reply, replySize);
}

bool Connection::request(const Deadline &deadline, wire::MessageId id, std::initializer_list<Bytes> body, void *reply,
                         size_t replySize) {
  if (!alive_) return false;
  const uint32_t sequence = ++sequence_;
  outgoing_.clear();
  append(id, sequence, body);
  return send() && awaitReply(deadline, id, sequence, reply, replySize);
}

bool Connection::pauseAll() {
  if (!alive_) return false;
  constexpr auto kControl = wire::MessageId::kControlCommandResponse;
  wire::ControlCommandResponse replies{};
  replies.now = 1;
  outgoing_.clear();
  append(kControl, ++sequence_, {replies});
  wire::PauseVcpu pause{};
  pause.wait = 1;
  for (size_t vcpu = 0; vcpu < outstanding_.size(); vcpu++) {
    wire::VcpuHeader header{};
    header.vcpu = static_cast<uint16_t>(vcpu);
    append(wire::MessageId::kPauseVcpu, ++sequence_, {header, pause});
  }
  replies.enable = 1;
  append(kControl, ++sequence_, {replies});
  return send() && awaitReply(Deadline(kReplyTimeoutMs), kControl, sequence_, nullptr, 0);
}

bool Connection::answer(unsigned vcpu, wire::EventId event, uint32_t sequence, std::optional<Bytes> specific) {
  if (!alive_) return false;
  wire::VcpuHeader header{};
  header.vcpu = static_cast<uint16_t>(vcpu);
  wire::EventReply reply{};
  reply.action = wire::kActionContinue;
  reply.event = static_cast<uint8_t>(event);
  outgoing_.clear();
  append(wire::MessageId::kEventReply, sequence, {header, reply, specific.value_or(Bytes(nullptr, 0))});
  outstanding_[vcpu].reset();
  return send();
}

bool Connection::awaitEvent(const Deadline &deadline) {
  while (alive_ && events_.empty()) {
    if (const auto message = nextMessage()) {
      if (message->header.id != static_cast<uint16_t>(wire::MessageId::kEvent))
        return die("message %u came where only events are expected", message->header.id);
      return enqueue(*message);
    }
    if (alive_ && receive(deadline) == Received::kNothing) break;
  }
  return alive_;
}

std::optional<Event> Connection::nextEvent() {
  if (events_.empty()) return std::nullopt;
  const Event event = events_.front();
  events_.pop_front();
  return event;
}

void Connection::append(wire::MessageId id, uint32_t sequence, std::initializer_list<Bytes> body) {
  size_t size = 0;
  for (const Bytes &piece : body) size += piece.size;
  const wire::Header header{static_cast<uint16_t>(id), static_cast<uint16_t>(size), sequence};
  const auto add = [this](const Bytes &piece) {
    const auto *data = static_cast<const uint8_t *>(piece.data);
    outgoing_.insert(outgoing_.end(), data, data + piece.size);
  };
  add(header);
  for (const Bytes &piece : body) add(piece);
}

/** Sends all of `outgoing_` with one call, unless the socket's buffer is full. */
bool Connection::send() {
  const Deadline deadline(kReplyTimeoutMs);
  for (size_t done = 0; done < outgoing_.size();) {
    const ssize_t sent = ::send(socket_.get(), &outgoing_[done], outgoing_.size() - done, MSG_NOSIGNAL);
    if (sent > 0) {
      done += static_cast<size_t>(sent);
    } else if (errno == EAGAIN) {
      pollfd waiting{socket_.get(), POLLOUT, 0};
      if (poll(&waiting, 1, deadline.remaining()) == 0) return die("the hypervisor does not read its messages");
    } else if (errno != EINTR) {
      return die("the hypervisor has gone away: %s", strerror(errno));
    }
  }
  return true;
}

bool Connection::awaitReply(const Deadline &deadline, wire::MessageId id, uint32_t sequence, void *reply,
                            size_t replySize) {
  while (alive_) {
    while (const auto message = nextMessage()) {
      const wire::Header &header = message->header;
      if (header.id == static_cast<uint16_t>(wire::MessageId::kEvent)) {
        if (!enqueue(*message)) return false;
      } else if (header.id != static_cast<uint16_t>(id) || header.sequence != sequence) {
        return die("message %u (number %u) came where the reply to %u (number %u) is expected", header.id,
                   header.sequence, static_cast<unsigned>(id), sequence);
      } else {
        return takeReply(*message, reply, replySize);
      }
    }
    if (alive_ && receive(deadline) == Received::kNothing)
      return die("the hypervisor left command %u unanswered", static_cast<unsigned>(id));
  }
  return false;
}

/** A refusal is an answer: the connection stays alive. */
bool Connection::takeReply(const Message &message, void *reply, size_t replySize) {
  wire::Status status;
  const size_t size = message.header.size;
  if (size < sizeof status) return die("a reply of %zu bytes", size);
  memcpy(&status, message.body, sizeof status);
  if (status.error != 0) return false;
  if (size - sizeof status < replySize)
    return die("a reply to %u with %zu bytes of %zu", message.header.id, size - sizeof status, replySize);
  if (replySize > 0) memcpy(reply, message.body + sizeof status, replySize);
  return true;
}

/** Waits for more bytes. The caller has used up all that can be used, so that there is room. */
Connection::Received Connection::receive(const Deadline &deadline) {
  if (head_ > 0) {
    memmove(&incoming_[0], &incoming_[head_], tail_ - head_);
    tail_ -= head_;
    head_ = 0;
  }
  for (;;) {
    pollfd waiting{socket_.get(), POLLIN, 0};
    const int ready = poll(&waiting, 1, deadline.remaining());
    if (ready == 0) return Received::kNothing;
    const ssize_t received = ready < 0 ? -1 : recv(socket_.get(), &incoming_[tail_], incoming_.size() - tail_, 0);
    if (received > 0) {
      tail_ += static_cast<size_t>(received);
      return Received::kData;
    }
    if (received < 0 && (errno == EINTR || errno == EAGAIN)) continue;
    die("the hypervisor has gone away%s%s", received < 0 ? ": " : "", received < 0 ? strerror(errno) : "");
    return Received::kDead;
  }
}

/** Takes one whole message out of the buffer; its body is valid until the next `receive`. */
std::optional<Connection::Message> Connection::nextMessage() {
  Message message;
  if (tail_ - head_ < sizeof message.header) return std::nullopt;
  memcpy(&message.header, &incoming_[head_], sizeof message.header);
  if (message.header.size > wire::kMaxBody) {
    die("message %u of %u bytes", message.header.id, message.header.size);
    return std::nullopt;
  }
  const size_t size = sizeof message.header + message.header.size;
  if (tail_ - head_ < size) return std::nullopt;
  message.body = &incoming_[head_] + sizeof message.header;
  head_ += size;
  return message;
}

bool Connection::enqueue(const Message &message) {
  Event event{};
  const size_t size = message.header.size;
  if (size < sizeof event.common) return die("an event of %zu bytes", size);
  memcpy(&event.common, message.body, sizeof event.common);
  if (event.common.size < sizeof event.common || event.common.size > size)
    return die("an event of %zu bytes that claims %u in common", size, event.common.size);
  if (event.common.event >= wire::kEventIds) return die("an event of unknown kind %u", event.common.event);
  if (event.vcpu() >= outstanding_.size()) return die("an event of vCPU %u, which does not exist", event.vcpu());
  if (outstanding_[event.vcpu()]) return die("a second event of vCPU %u before the first was answered", event.vcpu());

  const size_t specific = specificSize(event.id());
  if (size - event.common.size < specific) return die("an event of kind %u is cut short", event.common.event);
  memcpy(&event.pageFault, message.body + event.common.size, specific);
  event.sequence = message.header.sequence;
  outstanding_[event.vcpu()] = event;
  events_.push_back(event);
  return true;
}

bool Connection::die(const char *format, ...) {
  if (alive_) {
    char reason[256];
    va_list arguments;
    va_start(arguments, format);
    vsnprintf(reason, sizeof reason, format, arguments);
    va_end(arguments);
    vmi::complain("%s", reason);
    alive_ = false;
    events_.clear();
    shutdown(socket_.get(), SHUT_RDWR);
  }
  return false;
}

}  // namespace kvmi
