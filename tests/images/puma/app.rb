require "json"
require "sinatra/base"

class App < Sinatra::Base
  LOCK = Mutex.new
  VOTES = Hash.new(0)

  get "/" do
    content_type :json
    LOCK.synchronize { VOTES.to_json }
  end

  post "/votes/:name" do
    LOCK.synchronize { (VOTES[params[:name]] += 1).to_s }
  end
end
